"""Llama-shaped checkpoints for whole-model benchmarks: a base N(0, 0.02) and models base + N(0, 0.002), bf16, 3 shards.

python -m fastmerge.benchmarks.merges.checkpoints FOLDER            # base and four models of 1.01 GB each
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

SHARDS = 3


def shapes(hidden: int, inter: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama with 32 heads, 8 of them for keys and values, and a tied head."""
    kv = hidden // 4
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (inter, hidden)),
            ("mlp.up_proj", (inter, hidden)),
            ("mlp.down_proj", (hidden, inter)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ):
            out[f"{p}{name}.weight"] = shape
    out["model.norm.weight"] = (hidden,)
    return out


def config(shape: dict[str, tuple[int, ...]]) -> dict[str, object]:
    """What transformers needs to know of such a model."""
    vocabulary, hidden = shape["model.embed_tokens.weight"]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": shape["model.layers.0.mlp.up_proj.weight"][0], "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in shape),
        "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip


def write(folder: Path, shape: dict[str, tuple[int, ...]], seed: int) -> None:
    """Model number `seed` (0 = the base) into `folder`, one tensor in memory at a time but for its shard."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    total = sum(torch.Size(s).numel() for s in shape.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(SHARDS)]
    where: dict[str, str] = {}
    done = 0
    for i, (name, size) in enumerate(shape.items()):
        numel = torch.Size(size).numel()
        at = min(SHARDS - 1, SHARDS * done // total)
        done += numel
        value = torch.randn(size, generator=torch.Generator().manual_seed(i)).mul_(0.02)
        if seed:
            value += torch.randn(size, generator=torch.Generator().manual_seed(1000 * seed + i)).mul_(0.002)
        shards[at][name] = value.bfloat16()
        where[name] = f"model-{at + 1:05d}-of-{SHARDS:05d}.safetensors"
    for at, tensors in enumerate(shards):
        save_file(tensors, folder / f"model-{at + 1:05d}-of-{SHARDS:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(shape)))


def family(
    folder: Path, count: int = 4, *, layers: int = 4, hidden: int = 2048, vocabulary: int = 128256
) -> list[Path]:
    """The base and `count` models under `folder`, made where they are missing."""
    shape = shapes(hidden, 4 * hidden, layers, vocabulary)
    names = ["base", *(f"model{i + 1}" for i in range(count))]
    for seed, name in enumerate(names):
        if not (folder / name / "config.json").exists():
            write(folder / name, shape, seed)
    return [folder / n for n in names]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    arguments = parser.parse_args()
    made = family(
        arguments.folder,
        arguments.models,
        layers=arguments.layers,
        hidden=arguments.hidden,
        vocabulary=arguments.vocabulary,
    )
    print("\n".join(map(str, made)))

"""Small checkpoints on disk for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG = {"architectures": ["TinyForCausalLM"], "model_type": "llama", "num_hidden_layers": 3, "torch_dtype": "float32"}


def tiny_state(
    seed: int = 0, *, layers: int = 3, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> dict[str, Tensor]:
    """A Llama-named toy: embeddings, `layers` blocks, norms and an integer buffer."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    state = {"model.embed_tokens.weight": r(37, 8)}
    for i in range(layers):
        state[f"model.layers.{i}.self_attn.q_proj.weight"] = r(8, 8)
        state[f"model.layers.{i}.mlp.up_proj.weight"] = r(13, 8)
        state[f"model.layers.{i}.input_layernorm.weight"] = r(8)
    state["model.norm.weight"] = r(8)
    state["model.position_ids"] = torch.arange(5)
    return state


def near(state: dict[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """A fine-tune of `state`: every float tensor moved a little."""
    g = torch.Generator().manual_seed(seed)
    return {
        k: (v.float() + scale * torch.randn(v.shape, generator=g)).to(v.dtype) if v.is_floating_point() else v.clone()
        for k, v in state.items()
    }


def save(folder: Path, state: dict[str, Tensor], *, shards: int = 1, config: dict[str, Any] | None = None) -> Path:
    """Write an HF-like folder with safetensors (and an index when sharded), config and a tokenizer stub."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous() for k, v in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        names = list(state)
        weight_map = {}
        for s in range(shards):
            file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
            part = {n: state[n] for n in names[s::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": sum(v.nbytes for v in state.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the safetensors library."""
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out.update(load_file(file))
    return out

"""Aligning and permuting two networks of ViT-B/16's size, data-free: seconds, sweeps, peak memory.

Run: python -m fastmerge.benchmarks.merges.mudsc [layers] [sweeps]
"""

import json
import resource
import sys
import time

import torch
from torch import Tensor

from fastmerge.structure import align, named_spec


def vit(seed: int, layers: int, dim: int = 768) -> dict[str, Tensor]:
    """Random tensors with timm's names and ViT-B/16's shapes."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * 0.02

    s = {
        "cls_token": r(1, 1, dim),
        "pos_embed": r(1, 197, dim),
        "patch_embed.proj.weight": r(dim, 3, 16, 16),
        "patch_embed.proj.bias": r(dim),
    }
    for i in range(layers):
        for name, shape in {
            "norm1.weight": (dim,), "norm1.bias": (dim,), "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,), "norm2.weight": (dim,), "norm2.bias": (dim,),
            "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,), "mlp.fc2.weight": (dim, 4 * dim),
            "mlp.fc2.bias": (dim,),
        }.items():  # fmt: skip
            s[f"blocks.{i}.{name}"] = r(*shape)
    return {**s, "norm.weight": r(dim), "norm.bias": r(dim), "head.weight": r(1000, dim), "head.bias": r(1000)}


def main() -> None:
    layers, sweeps = (int(v) for v in (sys.argv[1:] + ["12", "10"][len(sys.argv) - 1 :])[:2])
    a, b = vit(1, layers), vit(2, layers)
    spec = named_spec("vit", a, heads=12)
    begin = time.perf_counter()
    found = align([a, b], spec, order="random", sweeps=sweeps, patience=sweeps)
    seconds = time.perf_counter() - begin
    moved = found.apply(b, 1)
    big = b["blocks.0.mlp.fc1.weight"]
    out = torch.empty_like(big)

    def best(f: object) -> float:
        times = []
        for _ in range(7):
            t = time.perf_counter()
            f()  # type: ignore[operator]
            times.append(time.perf_counter() - t)
        return min(times)

    from fastmerge.ops import permute

    axes = {
        x.axis: i for x in spec.tensors["blocks.0.mlp.fc1.weight"] if (i := spec.index(x, found.perms[1])) is not None
    }
    copy, gather = best(lambda: out.copy_(big)), best(lambda: permute(big, axes, out=out, check=False))
    print(
        json.dumps(
            {
                "layers": layers,
                "sweeps": [[s.number, round(s.objective, 5), s.accepted, round(s.seconds, 2)] for s in found.trace[1]],
                "seconds": round(seconds, 1),
                "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "permute_over_copy_bandwidth": round(copy / gather, 2),
                "threads": torch.get_num_threads(),
                "tensors": len(moved),
            }
        )
    )


if __name__ == "__main__":
    main()

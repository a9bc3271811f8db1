"""Aligning and permuting two networks of ViT-B/16's size, data-free, and zip matching: seconds, sweeps, peak memory.

The second network is a permuted copy of the first with noise as large as the weights themselves. --worst scrambles the
residual stream before each sweep, so that nothing can be kept from the one before.

Run: python -m fastmerge.benchmarks.merges.mudsc [--layers 12] [--sweeps 10] [--worst] [--zip]
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastmerge._native import threads
from fastmerge.ops import permute, zip_match
from fastmerge.structure import named_spec
from fastmerge.structure.alignment import Search
from fastmerge.structure.zipping import ZipSearch


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


def best(f: Callable[[], object], times: int = 7) -> float:
    """Least seconds of several calls."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)


def align_networks(layers: int, sweeps: int, worst: bool) -> dict[str, object]:
    a = vit(1, layers)
    spec = named_spec("vit", a, heads=12)
    b = vit(2, layers)
    for name, t in spec.permute_state(a, spec.random(torch.Generator().manual_seed(3))).items():
        b[name] += t
    begin = time.perf_counter()
    search = Search(spec, a, b, None, 1.0, "pearson")
    workers = threads()
    seconds: list[float] = []
    g = torch.Generator().manual_seed(4)
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(sweeps):
            order = torch.randperm(len(search.units), generator=g).tolist()
            if worst:
                search.perms["stream"] = torch.randperm(spec.size("stream"), generator=g)
            begin = time.perf_counter()
            search.sweep(order, pool)
            seconds.append(round(time.perf_counter() - begin, 2))
    torch.set_num_threads(workers)
    peak = peak_gb()
    axes = {
        n: {x.axis: i for x in spec.tensors.get(n, ()) if (i := spec.index(x, search.perms)) is not None} for n in b
    }
    del a, search
    outs = {n: torch.empty_like(t) for n, t in b.items()}

    def copy_all() -> None:
        for n, t in b.items():
            outs[n].copy_(t)

    copy = best(copy_all, 5)
    gather = best(lambda: permute(list(b.values()), list(axes.values()), out=list(outs.values()), check=False), 5)
    return {
        "layers": layers,
        "sweeps": seconds,
        "seconds": round(sum(seconds), 1),
        "peak_rss_gb": peak,
        "permute_over_copy_bandwidth": round(copy / gather, 2),
    }


def zip_times() -> dict[str, float]:
    """Seconds of zip_match for n units per network, and of the grouped zip of 12 heads of 64 dims."""

    def similarity(n: int) -> torch.Tensor:
        return torch.corrcoef(torch.randn(2 * n, 256, generator=torch.Generator().manual_seed(n)))

    out = {}
    for n, times in ((512, 7), (4096, 2)):
        matrix = similarity(n)
        out[f"zip n={n}"] = round(best(lambda matrix=matrix: zip_match(matrix, dense=False), times), 4)  # type: ignore[misc]
    a = vit(1, 1)
    search = ZipSearch(named_spec("vit", a, heads=12), [a, a], None, 1.0, "pearson")  # type: ignore[no-untyped-call]
    unit = next(u for u in search.units if len(u.groups) > 1)
    values = {s: similarity(768) for s in unit.signatures if len(s) == 2 and "v" in s[1].rpartition(".")[2]}
    out["group zip 12x64"] = round(best(lambda: search._solve(unit, dict(list(values.items())[:1]))), 4)
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sweeps", type=int, default=10)
    parser.add_argument("--worst", action="store_true")
    parser.add_argument("--zip", action="store_true", help="only the zip matchings")
    given = parser.parse_args()
    found = zip_times() if given.zip else align_networks(given.layers, given.sweeps, given.worst)
    print(json.dumps({**found, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()

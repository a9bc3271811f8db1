"""FREE's costs on a CPU: extracting experts, swapping them, and the size of their files.

python -m fastmerge.benchmarks.merges.free [extract | swap | file]

The swap's rival is a plain loop of indexed stores in C++, compiled here with the machine's compiler (-O3 -march=native),
over the same positions: one loop writes back what the old expert had replaced, one writes the new expert's sums.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmerge import _native, experts, ops

from ..declare import Make

LOOP = """
#include <cstdint>
template <class T> static void store(T* x, const std::int32_t* at, const T* v, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) x[at[i]] = v[i];
}
extern "C" void store32(std::uint32_t* x, const std::int32_t* at, const std::uint32_t* v, std::int64_t n) { store(x, at, v, n); }
extern "C" void store16(std::uint16_t* x, const std::int32_t* at, const std::uint16_t* v, std::int64_t n) { store(x, at, v, n); }
"""
LAYERS, WIDTH = 16, 2048


def timed(calls: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of each call, alternating; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for r in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if r:
                seconds[name].append(time.perf_counter() - begin)
    return {name: round(1e3 * statistics.median(s), 3) for name, s in seconds.items()}


def ratios(row: dict[str, float], mine: str) -> dict[str, float]:
    return {name: round(v / row[mine], 2) for name, v in row.items() if name != mine}


def extract() -> dict[str, Any]:
    """4096 x 4096, 1 % of every row, from a base and a model to positions and values."""
    from ..ops.expert_gather import BENCH, torch_topk, torch_topk_alone

    return {variant.name: _extract(variant.make, torch_topk, torch_topk_alone) for variant in BENCH.variants}


def _extract(make: Make, rival: Callable[..., Any], alone: Callable[..., Any]) -> dict[str, Any]:
    (base, model, density), _ = make(torch.device("cpu"))
    delta = model.float() - base.float()
    row = timed(
        {
            "expert_gather": lambda: ops.expert_gather(base, model, density),
            "torch.topk, sort, gather": lambda: rival(base, model, density),
            "torch.topk alone": lambda: alone(base, model, density),
            "expert_gather of a given delta": lambda: ops.expert_gather(None, delta, density),
            "torch.topk of a given delta": lambda: delta.abs().topk(int(density * 4096), dim=-1),
            "extract(): one expert, mu and all": lambda: experts.extract({"w": base}, [{"w": model}]),
            'extract(by="tensor")': lambda: experts.extract({"w": base}, [{"w": model}], by="tensor"),
        },
        rounds=9,
    )
    return {"ms": row, "times expert_gather": ratios(row, "expert_gather")}


def network(dtype: torch.dtype, seed: int) -> nn.Sequential:
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(WIDTH, WIDTH, generator=g) * 0.02)
    return net


def pair(dtype: torch.dtype) -> tuple[nn.Sequential, list[experts.Expert]]:
    """A network of 67 million weights and two experts at density 1 %."""
    net = network(dtype, 0)
    models = []
    for seed in (1, 2):
        other = network(dtype, seed)
        for p, o in zip(net.parameters(), other.parameters(), strict=True):
            o.data.mul_(0.1).add_(p.data)
        models.append(other)
    return net, experts.extract(net, models, density=0.01)


def compiled() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    (folder / "loop.cpp").write_text(LOOP)
    command = [
        "g++",
        "-O3",
        "-march=native",
        "-shared",
        "-fPIC",
        str(folder / "loop.cpp"),
        "-o",
        str(folder / "loop.so"),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "loop.so"))


def swap() -> dict[str, Any]:
    """From one expert to the other, 16 x 2048 x 2048 weights, in fp32 and bf16."""
    loop = compiled()
    return {str(t): _swap(t, f) for t, f in ((torch.float32, loop.store32), (torch.bfloat16, loop.store16))}


def _swap(dtype: torch.dtype, store: Any) -> dict[str, Any]:
    net, made = pair(dtype)
    flats = [p.detach().view(-1) for p in net.parameters()]
    free = experts.FreeModel(net, made)
    sets: list[list[tuple[Tensor, Tensor, Tensor]]] = []  # per expert and tensor: int32, int64 positions, sums
    for e in made:
        sets.append([])
        for flat, t in zip(flats, e.tensors.values(), strict=True):
            sums = (flat[t.index].float() + t.value.float() * t.mu).to(dtype)
            sets[-1].append((t.index.int(), t.index, sums))
    turn, mine = [0], [0]

    def both() -> tuple[list[tuple[Tensor, Tensor, Tensor]], list[tuple[Tensor, Tensor, Tensor]]]:
        turn[0] ^= 1
        return sets[turn[0]], sets[turn[0] ^ 1]

    def plain() -> None:
        for part in both():
            for flat, (index, _, value) in zip(flats, part, strict=True):
                store(*(ctypes.c_void_p(t.data_ptr()) for t in (flat, index, value)), ctypes.c_int64(index.numel()))

    def put() -> None:
        for part in both():
            for flat, (_, index, value) in zip(flats, part, strict=True):
                flat.index_put_((index,), value)

    terms = [[(t.value * t.mu).to(dtype) for t in e.tensors.values()] for e in made]

    def put_add() -> None:
        """What a user writes to add an expert, after taking the other one away; not exact, and drifts."""
        turn[0] ^= 1
        old, new = turn[0] ^ 1, turn[0]
        for n, flat in enumerate(flats):
            flat.index_put_((sets[old][n][1],), -terms[old][n], accumulate=True)
            flat.index_put_((sets[new][n][1],), terms[new][n], accumulate=True)

    def use() -> None:
        mine[0] ^= 1
        free.use(free.tasks[mine[0]])

    def use_one() -> None:
        with _native.limit_threads(1):
            use()

    with torch.inference_mode():
        row = timed(
            {
                "use": use,
                "use, one thread": use_one,
                "plain loop": plain,
                "index_put_": put,
                "index_put_, accumulate": put_add,
            }
        )
    return {
        "entries of an expert": made[0].entries,
        "ms": row,
        "use / plain loop": round(row["use"] / row["plain loop"], 2),
        "use, one thread / plain loop": round(row["use, one thread"] / row["plain loop"], 2),
        "index_put_ / use": round(row["index_put_"] / row["use"], 2),
        "index_put_, accumulate / use": round(row["index_put_, accumulate"] / row["use"], 2),
    }


def file() -> dict[str, Any]:
    """Expert files of the same network at density 1 %, as a share of the model in its dtype."""
    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.bfloat16, torch.float32):
            net, _ = pair(dtype)
            other = network(dtype, 1)
            for by in ("row", "tensor"):
                (e,) = experts.extract(net, [other], density=0.01, by=by)  # type: ignore[arg-type]
                size = experts.save(e, Path(folder) / "e.safetensors")
                whole = sum(p.numel() * p.element_size() for p in net.parameters())
                out[f"{dtype}, {by}"] = {"bytes": size, "share of the model, %": round(100 * size / whole, 3)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("extract", "swap", "file"))
    chosen = parser.parse_args().what
    every = {"extract": extract, "swap": swap, "file": file}
    print(json.dumps({name: f() for name, f in every.items() if chosen in (None, name)}, indent=1))


if __name__ == "__main__":
    main()

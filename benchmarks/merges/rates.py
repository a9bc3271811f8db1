"""One worker's rate for every method: GB of inputs a second, reading included and not.

python -m fastmerge.benchmarks.merges.rates [METHOD ...] [--shape ROWS COLUMNS] [--models N] [--dtype NAME] [--rounds N]

One tensor of a base and N models goes through the engine's own passes (`Job.apply`: scan, merge, the search for NaN) on one
thread, from files in the page cache, and the result is dropped. Methods take turns, so that a machine that drifts slows
all of them; the median of the rounds counts. `reads` is how often the inputs were read; what reading takes on its own is
measured in the same rounds, and `merging` is the rate without it. `--device auto` (fastmerge/device/choose.py) goes by that of
methods without a pass before the merge: task_arithmetic, "dare_ties, merge alone", "della, merge alone", fr.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastmerge import _native
from fastmerge.io.checkpoint import open_checkpoint
from fastmerge.io.pipeline import opened
from fastmerge.job import Job
from fastmerge.methods import get, names
from fastmerge.recipe import Recipe

from ..declare import family
from .peers import METHODS

# What peers.py has no scenario for, and other ways to run the same method.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "fr": ("fr", {}),
    "sce, all elements": ("sce", {}),
    "dare_ties, merge alone": ("dare_ties", {"weight": 0.3, "density": 0.2, "rescale": False}),
    "della, merge alone": ("della", {"weight": 0.3, "density": 0.3, "epsilon": 0.1, "rescale": False}),
    "breadcrumbs, L1": ("breadcrumbs", {"weight": 0.3, "density": 0.9, "gamma": 0.01, "rescale": True}),
    "nuslerp, columns": ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False}),
    "nuslerp, rows": ("nuslerp", {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "model_stock, filters": ("model_stock", {"filter_wise": True}),
}


@dataclass
class Rate:
    """One method's medians: seconds, and how often its inputs were read."""

    name: str
    nbytes: int  # of the inputs, each once
    seconds: float
    reads: float
    reading: float  # seconds that the reads take alone


def cases(chosen: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Row -> (method, parameters) for the methods asked for, or all that run from weights alone, one tensor at a time."""
    every = {name: (name, dict(METHODS[name].parameters)) for name in names() if name in METHODS} | MORE
    every = {row: case for row, case in every.items() if get(case[0]).files_pass is None}
    if unknown := set(chosen) - {method for method, _ in every.values()}:
        raise SystemExit(f"no rate for {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    return {row: case for row, case in every.items() if not chosen or case[0] in chosen}


def merger(method: str, parameters: dict[str, Any], folder: Path, count: int) -> tuple[Callable[[], int], int]:
    """(a call that merges once and returns the bytes it read, the bytes of its inputs)."""
    rule = get(method)
    paths = [str(folder / f"model{i}") for i in range(min(count, rule.models[1] or count))]
    base = None if rule.base == "ignored" else str(folder / "base")
    recipe = Recipe.from_call(method, base, paths, parameters)
    models = [open_checkpoint(p) for p in paths]
    template = models[0] if base is None else open_checkpoint(base)
    nbytes = sum(m.nbytes("w") for m in models) + (0 if base is None else template.nbytes("w"))

    def once() -> int:
        with opened(1) as (pool, files), torch.no_grad(), _native.limit_threads(1):
            job = Job(recipe, rule, template, None if base is None else template, models, pool, files)
            plan = job.fit()
            (tensor,) = job.planned
            job.apply(
                tensor,
                plan,
                lambda offset, values: None,
                lambda begin, end: pool.buffers.get("out", end - begin, tensor.dtype),
            )
            return files.bytes_read

    return once, nbytes


def reader(folder: Path, count: int) -> tuple[Callable[[], int], int]:
    """Reading alone: `linear`'s chunks, read as it reads them, and nothing done with them."""
    models = [open_checkpoint(str(folder / f"model{i}")) for i in range(count)]
    recipe = Recipe.from_call("linear", None, [str(folder / f"model{i}") for i in range(count)], {"weight": 1.0})

    def once() -> int:
        with opened(1) as (pool, files):
            job = Job(recipe, get("linear"), models[0], None, models, pool, files, nan="allow")
            (tensor,) = job.planned
            stream = job.stream(tensor, lambda offset, values: None, check=False)
            stream.for_each(lambda offset, base, chunk: None)
            return files.bytes_read

    return once, sum(m.nbytes("w") for m in models)


def measure(chosen: Sequence[str], shape: tuple[int, int], count: int, dtype: torch.dtype, rounds: int) -> list[Rate]:
    """Medians of every case, the reading alone first."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, models = family(count, *shape, dtype=dtype)
        for name, tensor in [("base", base), *((f"model{i}", m) for i, m in enumerate(models))]:
            (folder / name).mkdir()
            save_file({"w": tensor}, folder / name / "model.safetensors", metadata={"format": "pt"})
        calls = {"reading alone": reader(folder, count)}
        calls |= {row: merger(*case, folder, count) for row, case in cases(chosen).items()}
        seconds: dict[str, list[float]] = {row: [] for row in calls}
        read: dict[str, int] = {}
        for each in range(1 + rounds):
            for row, (once, _) in calls.items():
                begin = time.perf_counter()
                read[row] = once()
                if each:  # the first round warms up
                    seconds[row].append(time.perf_counter() - begin)
        speed = calls["reading alone"][1] / statistics.median(seconds["reading alone"])
        return [
            Rate(row, nbytes, statistics.median(seconds[row]), read[row] / nbytes, read[row] / speed)
            for row, (_, nbytes) in calls.items()
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", help="without one: all")
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 2048))
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, columns = given.shape
    rates = measure(given.methods, (rows, columns), given.models, getattr(torch, given.dtype), given.rounds)
    print(
        f"{rows} x {columns}, base and {given.models} models (or as many as the method takes), {given.dtype}, one thread"
    )
    print(f"{'method':<24}{'ms':>8}{'reads':>7}{'GB/s':>8}{'merging GB/s':>14}")
    for r in rates:
        merging = "" if r.name == "reading alone" else f"{r.nbytes / max(r.seconds - r.reading, 1e-9) / 1e9:.2f}"
        print(f"{r.name:<24}{r.seconds * 1e3:>8.1f}{r.reads:>7.2f}{r.nbytes / r.seconds / 1e9:>8.2f}{merging:>14}")


if __name__ == "__main__":
    main()

"""Timing that can be compared: alternating calls, percentiles, and ceilings measured in the same run."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastmerge
from fastmerge import _native

from . import gpu


@dataclass(frozen=True)
class Times:
    """Seconds per call."""

    p20: float
    p50: float
    p80: float
    calls: int
    how: str = "clock"  # or "events", "graph"


def _percentiles(seconds: list[float], how: str) -> Times:
    ordered = sorted(seconds)
    pick = lambda q: ordered[min(len(ordered) - 1, int(q * len(ordered)))]  # noqa: E731
    return Times(pick(0.2), pick(0.5), pick(0.8), len(ordered), how)


def _once(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def side_by_side(
    calls: Mapping[str, Callable[[], Any]],
    runtime: gpu.Runtime | None = None,
    *,
    budget: float = 1.0,
    reset: Callable[[], None] | None = None,
    rotated: Mapping[str, Callable[[], Sequence[Callable[[], Any]]]] | None = None,
) -> dict[str, Times]:
    """Time each call in turn, A B C A B C, for about `budget` seconds each, at most 50 rounds.

    A machine that drifts then slows all of them alike, and their ratios hold. One untimed call each goes first, and at
    least 3 are timed, but of a call that takes longer than the budget by itself only one. With a `runtime` the calls run on its device and are timed as benchmarks/gpu.py says, `rotated` giving the calls of a graph.
    """
    once: dict[str, Callable[[], float]] = {}
    how = dict.fromkeys(calls, "clock")
    cost = {}
    for name, call in calls.items():
        if reset is not None:
            reset()
        if runtime is None:
            call()
            once[name] = functools.partial(_once, call)
        else:
            plan = gpu.plan(runtime, call, (rotated or {}).get(name) if reset is None else None)
            once[name], how[name] = functools.partial(plan.once, runtime), plan.how
        if reset is not None:
            reset()
        cost[name] = once[name]()
    quick = [name for name in calls if cost[name] <= budget]
    rounds = max(3, min(50, int(budget * len(quick) / max(sum(cost[name] for name in quick), 1e-9))))
    seconds: dict[str, list[float]] = {name: [] if name in quick else [cost[name]] for name in calls}
    for r in range(rounds):
        for name in quick:
            # A call that eats the budget is not repeated more than three times.
            if r >= 3 and sum(seconds[name]) > 3 * budget:
                continue
            if reset is not None:
                reset()
            seconds[name].append(once[name]())
    return {name: _percentiles(s, how[name]) for name, s in seconds.items()}


STREAM = 16 << 20  # 64 MiB of float32, beyond any cache


def moving(which: str, device: torch.device) -> tuple[Callable[[], Any], float]:
    """A call of torch's that copies or reads memory, and the bytes it moves."""
    a = torch.ones(STREAM, device=device)
    if which == "read":
        return a.sum, 4.0 * STREAM
    b = torch.ones(STREAM, device=device)
    return lambda: b.copy_(a), 8.0 * STREAM


def ceilings(device: torch.device, runtime: gpu.Runtime | None = None) -> dict[str, float]:
    """What this machine can do, through torch: copy, read and triad in bytes/s, FFT and GEMM in flop/s."""
    a, b, c = (torch.ones(STREAM, device=device) for _ in range(3))
    x = torch.randn(2048, 2048, device=device)
    y, z = torch.randn(2048, 2048, device=device), torch.empty(2048, 2048, device=device)
    calls: dict[str, tuple[Callable[[], Any], float]] = {
        "copy": moving("copy", device),
        "read": moving("read", device),
        "triad": (lambda: torch.add(a, b, alpha=2.0, out=c), 12.0 * STREAM),
        "gemm": (lambda: torch.mm(x, y, out=z), 2.0 * 2048**3),
        "rfft2": (lambda: torch.fft.rfft2(x), 2.5 * 2048 * 2048 * 22),
    }
    times = side_by_side({k: v[0] for k, v in calls.items()}, runtime, budget=0.3)
    return {name: amount / times[name].p20 for name, (_, amount) in calls.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Where a row was measured."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "driver": _driver() if gpu else None,
        "threads": _native.threads(),
        "fastmerge": fastmerge.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cupy": _version("cupy-cuda12x") or _version("cupy-cuda13x") or _version("cupy"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({os.cpu_count()} CPUs)"


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None

"""Merges of state dicts that are in memory already, on the CPU or a GPU, against plain PyTorch on the same device.

    python -m fastmerge.benchmarks.merges.in_memory [METHOD ...] [--device cuda] [--layers 6] [--hidden 4096] [--models 4]

A layer is two [hidden, hidden] matrices, one [2.75 hidden, hidden], one [hidden, 2.75 hidden] and two vectors. Both sides take a dict of
tensors and give one; plain PyTorch takes a tensor after another in float32, as a user writes it (plain.py). Rounds take turns and
the median counts. GB/s are those of inputs and output, each once; the peak is what was allocated beside the models.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastmerge as fm

from ..declare import family
from .peers import METHODS
from .plain import MERGES

DEFAULT = ("linear", "task_arithmetic", "ties", "dare_linear", "fr")
State = dict[str, Tensor]


def states(layers: int, hidden: int, models: int, device: torch.device) -> list[State]:
    """A base and its fine-tunes, bf16."""
    wide = hidden * 11 // 4
    shapes = {
        "q": (hidden, hidden),
        "o": (hidden, hidden),
        "up": (wide, hidden),
        "down": (hidden, wide),
        "a": (hidden,),
        "b": (hidden,),
    }
    made: list[State] = [{} for _ in range(models + 1)]
    for name, shape in shapes.items():
        base, others = family(models, *shape, dtype=torch.bfloat16, device=device)
        for layer in range(layers):
            for state, t in zip(made, (base, *others), strict=True):
                state[f"layers.{layer}.{name}.weight"] = t.roll(layer)
    return made


def plainly(method: str, base: State, models: list[State], parameters: dict[str, Any], device: torch.device) -> State:
    """Name by name, in float32."""
    if method == "fr":

        def merge(b: Tensor, m: list[Tensor], p: dict[str, Any]) -> Tensor:
            deltas = torch.stack([t - b for t in m])
            size = deltas.abs().flatten(1).mean(1)
            delta = (deltas * (size / size.sum()).view(-1, *[1] * b.ndim)).sum(0)
            if delta.ndim < 2:
                return b + delta
            bins = torch.fft.rfft2(delta)
            fy, fx = (torch.fft.fftfreq(delta.shape[0]) * 2)[:, None], torch.fft.rfftfreq(delta.shape[1])[None, :] * 2
            return b + torch.fft.irfft2(bins * (fy.square() + fx.square() >= 0.1**2), s=delta.shape)
    else:
        merge = MERGES[method]
    with torch.device(device):
        return {
            name: merge(t.float(), [m[name].float() for m in models], parameters).to(t.dtype)
            for name, t in base.items()
        }


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, int]:
    """(seconds, bytes allocated on the GPU at the peak beside what was there)."""
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if gpu else 0
    begin = time.perf_counter()
    call()
    if gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated(device) - held if gpu else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastmerge.benchmarks.merges.in_memory", description=__doc__)
    parser.add_argument("methods", nargs="*", default=list(DEFAULT))
    parser.add_argument("--device", default="cpu")
    for name, default in (("layers", 6), ("hidden", 4096), ("models", 4), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    base, *models = states(args.layers, args.hidden, args.models, device)
    size = sum(t.nbytes for t in base.values())
    print(
        f"{args.models} models of {size / 1e9:.2f} GB bf16 on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'the CPU'}"
    )
    print(f"{'method':<16} {'fastmerge s':>12} {'torch s':>9} {'x':>6} {'GB/s':>7} {'peak GB':>8} {'torch':>6}")
    for method in args.methods:
        scenario = METHODS.get(method)
        given = dict(scenario.parameters) if scenario else {}
        root = None if scenario and not scenario.base else base
        sides: tuple[Callable[[], Any], ...] = (
            lambda m=method, r=root, g=given: fm.merge(
                m, r, models, device="auto" if device.type == "cuda" else "cpu", **g
            ),  # type: ignore[misc]
            lambda m=method, g=given: plainly(m, base, models, g, device),  # type: ignore[misc]
        )
        took: list[list[tuple[float, int]]] = [[timed(side, device) for side in sides] for _ in range(args.rounds + 1)][
            1:
        ]
        ours, torchs = (statistics.median(r[i][0] for r in took) for i in (0, 1))
        peaks = [max(r[i][1] for r in took) / 1e9 for i in (0, 1)]
        streams = len(models) + 1 + (root is not None)
        print(
            f"{method:<16} {ours:12.4f} {torchs:9.4f} {torchs / ours:6.1f} {streams * size / ours / 1e9:7.0f} {peaks[0]:8.2f} {peaks[1]:6.2f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

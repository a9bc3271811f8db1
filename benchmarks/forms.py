"""Times of every form of the Triton high-pass filter on a GPU, against torch's pair of transforms and a copy.

    python -m fastmerge.benchmarks.forms [--size 4096x4096 ...] [--cutoff 0.1 ...]

The constants of the cost model (triton_kernels/highpass_filter.py) come from this table. Microseconds are device time: ten
calls in a CUDA graph over one matrix, the best of three. The error is the relative root mean square one against float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastmerge import _triton, ops
from fastmerge.ops._spectral_mask import spectral_mask

from .gpu import CudaRuntime, Runtime

CALLS = 10
SIZES = ("512x512", "1024x1024", "2048x2048", "4096x4096", "8192x2048", "11008x4096", "50257x768")
CUTOFFS = (0.03, 0.1, 0.2, 0.4)
FORMS = ("pruned", "staged", "fft")


def microseconds(runtime: Runtime, call: Callable[[], Any]) -> float:
    """Device time of one call, launches left out."""
    call()
    graph = runtime.capture([call] * CALLS)
    graph()
    return min(runtime.elapsed(graph)[0] for _ in range(3)) / CALLS * 1e6


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().mean().sqrt() / want.square().mean().sqrt())


def rows(
    runtime: Runtime, device: torch.device, height: int, width: int, cutoffs: Sequence[float]
) -> list[tuple[float, dict[str, float], dict[str, float]]]:
    """(cutoff, microseconds by form, errors by form) of one size; "copy" and "torch" among the forms."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(height, width, generator=g).to(device)
    out = torch.empty_like(x)
    shape = (height, width)
    common = {
        "copy": microseconds(runtime, lambda: out.copy_(x)),
        "torch": microseconds(runtime, lambda: torch.fft.irfft2(torch.fft.rfft2(x), s=shape)),
    }
    run = _triton.kernel("highpass_filter")
    found = []
    for cutoff in cutoffs:
        mask = spectral_mask(height, width, cutoff, "radial", False)
        possible = _triton.kernel("highpass_filter", "costs")(mask)
        want = ops.highpass_filter(x.double(), cutoff, backend="reference")
        took, errors = dict(common), {}
        for form in FORMS:
            if form in possible:
                took[form] = microseconds(runtime, lambda f=form, m=mask: run([x], out, m, which=f))  # type: ignore[misc]
                errors[form] = error(out, want)
        found.append((cutoff, took, errors))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastmerge.benchmarks.forms", description=__doc__)
    parser.add_argument("--size", action="append", help="HEIGHTxWIDTH, several times")
    parser.add_argument("--cutoff", action="append", type=float, help="of the radial mask, several times")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("forms: there is no GPU here; run it on a machine with one", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    table = Table(title=torch.cuda.get_device_name())
    columns = ("copy", "torch", *FORMS)
    for name in ("matrix", "cutoff", *columns, *(f"{f}: error" for f in FORMS)):
        table.add_column(name, justify="right")
    for size in args.size or SIZES:
        height, width = (int(n) for n in size.split("x"))
        for cutoff, took, errors in rows(CudaRuntime(device), device, height, width, args.cutoff or CUTOFFS):
            times = [f"{took[c]:.0f}" if c in took else "" for c in columns]
            table.add_row(size, str(cutoff), *times, *(f"{errors[f]:.0e}" if f in errors else "" for f in FORMS))
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

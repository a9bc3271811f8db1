"""What a benchmark declares: inputs, the least bytes they move, flops, and what a user would run instead.

``benchmarks/ops/<op>.py`` holds one ``BENCH = Bench(...)``; timing, tables and rows are made from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Make = Callable[[torch.device], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Variant:
    """One size of an operator's inputs."""

    name: str  # e.g. "4 x bf16 4096x4096"
    make: Make  # device -> (args, kwargs) of the operator
    bytes: int  # least traffic: every input read once, every output written once
    flops: float = 0.0
    quick: bool = True  # part of the default sweep; the others run with --full


@dataclass(frozen=True)
class Bench:
    """An operator's benchmark. A rival is called as rival(*args, **kwargs) with the operator's arguments."""

    op: str
    variants: tuple[Variant, ...]
    rivals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    ceiling: Literal["copy", "read"] = "copy"  # of memory traffic; read where next to nothing is written
    setup: Callable[[tuple[Any, ...]], None] | None = None  # undoes what an in-place operator did, untimed
    cupy: Mapping[str, Callable[..., Any]] = field(
        default_factory=dict
    )  # rivals that take the arguments as CuPy arrays


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Seeded normal numbers, the same on every machine."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * scale).to(dtype).to(device or "cpu")


def family(
    count: int, *shape: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base N(0, 0.02) and `count` models base + N(0, 0.002), as fine-tunes are."""
    base = randn(*shape, seed=0, scale=0.02)
    models = [(base + randn(*shape, seed=1 + i, scale=0.002)).to(dtype).to(device or "cpu") for i in range(count)]
    return base.to(dtype).to(device or "cpu"), models

"""arcee_importance: the score by which Arcee Fusion selects elements."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype
from .arcee_divergence import check_pair, native_pair
from .sce_variance import family_case


def line_length(base: Tensor, row: int | None) -> int:
    """The elements of a row: those of the last axis unless the caller passes pieces of a larger tensor and says."""
    return max(1, row if row is not None else base.shape[-1] if base.ndim else 1)


def check_lines(op_name: str, base: Tensor, other: Tensor, divergence: Tensor, row: int | None, offset: int) -> int:
    """The length of a row; raises unless the divergence covers the rows of [offset, offset + numel)."""
    check_pair(op_name, base, other)
    if offset < 0:
        raise ValueError(f"{op_name}: offset {offset} is negative")
    if row is not None and row < 1:
        raise ValueError(f"{op_name}: row {row} is not a length")
    length = line_length(base, row)
    needed = -(-(offset + base.numel()) // length) if base.numel() else 0
    wide = compute_dtype(base, other)
    if divergence.numel() < needed:
        raise ValueError(f"{op_name}: divergence has {divergence.numel()} rows, {needed} are needed")
    if divergence.dtype != wide:
        raise TypeError(f"{op_name}: divergence has dtype {divergence.dtype}, expected {wide}")
    return length


def importance_of(delta: Tensor, divergence: Tensor, row: int, offset: int) -> Tensor:
    """|δ| times its row's divergence."""
    flat = delta.reshape(-1)
    line = torch.arange(offset, offset + flat.numel(), device=flat.device) // row
    return (flat.abs() * divergence.reshape(-1).to(flat.device)[line]).view(delta.shape)


@op(numerics="A", kind="elementwise")
def arcee_importance(
    base: Tensor, other: Tensor, divergence: Tensor, *, row: int | None = None, offset: int = 0
) -> Tensor:
    """How much each element of a model matters: ``out = |other − base| · divergence[row of the element]``.

    Args:
        base, other: [...] any shape, or a flat piece of a tensor; dtypes may differ.
        divergence: [rows] of the whole tensor, as :func:`arcee_divergence` gives it.
        row: elements of a row; default: base's last axis.
        offset: flat index of the first element within the whole tensor.

    Returns: float32 of base's shape, float64 when an input is.
    Numerics: class A: float32 (float64 when an input is), one difference, one product.
    Cost: two reads and one write of N elements, 2N flops, no workspace.
    Raises: TypeError for non-float tensors or a divergence of another dtype; ValueError for shapes that differ or rows
        without a divergence.
    Source: Arcee Fusion, as in mergekit's arcee_fusion.
    """
    length = check_lines("arcee_importance", base, other, divergence, row, offset)
    wide = compute_dtype(base, other)
    return importance_of(other.to(wide) - base.to(wide), divergence, length, offset)


@arcee_importance.backend("cpu", when=lambda base, other, *_, **__: _native.cpu_why_not(base, other))
def _arcee_importance_cpu(
    base: Tensor, other: Tensor, divergence: Tensor, *, row: int | None = None, offset: int = 0
) -> Tensor:
    length = check_lines("arcee_importance", base, other, divergence, row, offset)
    _dense, arrays = native_pair(base, other)
    lines = divergence.resolve_neg().contiguous()
    out = _native.fresh(base.shape, compute_dtype(base, other))
    _native.lib().arcee_importance(
        out.data_ptr(), *arrays, out.numel(), lines.data_ptr(), length, offset, _native.threads()
    )
    return out


def pair_case(
    g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A base, another model and `rows` divergences."""
    base, (other,) = family_case(g, dtype, shape, 1)
    return base, other, torch.rand(rows, generator=g).to(torch.float64 if dtype == torch.float64 else torch.float32)


def special_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros of both signs, NaN and Inf; the last row's divergence is 0."""
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([[0.0, -0.0, 1.0], [nan, inf, 1.0], [-0.0, 1.0, 1.0]], device="cpu").to(dtype)
    other = torch.tensor([[-0.0, 0.0, nan], [1.0, inf, -inf], [-0.0, 2.0, inf]], device="cpu").to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return base, other, torch.tensor([0.5, 2.0, 0.0], dtype=wide, device="cpu")


@arcee_importance.case("odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return pair_case(g, dtype, (131, 257), 131), {}


@arcee_importance.case("a piece from the middle of short rows")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return pair_case(g, dtype, (3000,), 1300), {"row": 3, "offset": 700}


@arcee_importance.case("special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return special_pair(dtype), {}


@arcee_importance.case("empty", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return pair_case(g, dtype, (0, 3), 0), {}


@arcee_importance.case("0-d", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return pair_case(g, dtype, (), 1), {}

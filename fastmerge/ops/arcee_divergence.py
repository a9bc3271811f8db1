"""arcee_divergence: how differently two models' rows would be read as distributions, by which Arcee Fusion weighs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, require_float, require_like
from .sce_variance import family_case


def check_pair(op_name: str, base: Tensor, other: Tensor) -> None:
    """Raises unless both are float tensors of one shape."""
    require_float(op_name, base=base)
    require_like(op_name, base, [other], "other")


def native_pair(base: Tensor, other: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int, int]]:
    """(the dense tensors, to be kept alive; their addresses and dtypes as the native kernels take them)."""
    a, b = base.contiguous(), other.contiguous()
    return (a, b), (a.data_ptr(), _native.DTYPES[a.dtype], b.data_ptr(), _native.DTYPES[b.dtype])


@op(numerics="B", kind="reduction")
def arcee_divergence(base: Tensor, other: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of each row's softmax from the base's: Arcee Fusion's weight of a row.

    ``out[...] = Σ p log(p / q)`` over the last axis, with p = softmax(other) + 1e-8 and q = softmax(base) + 1e-8.

    Args:
        base, other: [..., row] of one shape; dtypes may differ. A 0-d tensor is a row of one element.

    Returns: float32 [...] without the last axis, float64 when an input is.
    Numerics: class B: float64 throughout (the terms of a fine-tune are a thousand times their sum), 16 lanes in element
        order, then the lanes in order; rounded once. Exponential and logarithm are within a few units of a float64's last
        place. A row that holds NaN or +Inf gives NaN.
    Cost: two reads of N elements, about 70N flops, 16 bytes of workspace per element of a row and thread.
    Raises: TypeError for non-float tensors, ValueError for shapes that differ.
    Source: Arcee Fusion, as in mergekit's arcee_fusion.
    """
    check_pair("arcee_divergence", base, other)
    a, b = (x.double().reshape(x.shape or (1,)) for x in (base, other))
    p, q = b.softmax(-1) + 1e-8, a.softmax(-1) + 1e-8
    return (p * (p / q).log()).sum(-1).to(compute_dtype(base, other)).reshape(base.shape[:-1])


@arcee_divergence.backend("cpu", when=lambda base, other: _native.cpu_why_not(base, other))
def _arcee_divergence_cpu(base: Tensor, other: Tensor) -> Tensor:
    check_pair("arcee_divergence", base, other)
    out = torch.empty(base.shape[:-1], dtype=compute_dtype(base, other), device="cpu")
    if base.numel() == 0:
        return out.zero_()
    _dense, arrays = native_pair(base, other)
    row = base.shape[-1] if base.ndim else 1
    _native.lib().arcee_divergence(out.data_ptr(), *arrays, out.numel(), row, _native.threads())
    return out


@arcee_divergence.case("rows of an odd length")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, (other,) = family_case(g, dtype, (17, 1291), 1)
    return (base, other), {}


@arcee_divergence.case("three axes, short rows, wide values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, (other,) = family_case(g, dtype, (5, 31, 7), 1)
    return (base * 30, other * 30), {}


@arcee_divergence.case("special values", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([[0.0, 1.0, 2.0], [0.0, nan, 1.0], [0.0, inf, 1.0], [0.0, -inf, 1.0], [1e4, -1e4, 0.0]])
    other = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, 1e4, -1e4]])
    return (base.to(dtype), other.to(dtype)), {}


@arcee_divergence.case("one row", torch.float32, torch.float64)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, (other,) = family_case(g, dtype, (5000,), 1)
    return (base, other), {}


@arcee_divergence.case("0-d", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.tensor(1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype)), {}


@arcee_divergence.case("no rows, and rows of nothing", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.zeros(3, 0, dtype=dtype), torch.zeros(3, 0, dtype=dtype)), {}

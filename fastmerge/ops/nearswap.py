"""nearswap: interpolate towards another model, most where the two are near."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, require_float, require_like, result_like


def _check(base: Tensor, other: Tensor, t: float) -> None:
    require_float("nearswap", base=base)
    require_like("nearswap", base, [other], "other")
    if not math.isfinite(t):
        raise ValueError(f"nearswap: t {t} is not finite")


@op(numerics="A", kind="elementwise")
def nearswap(
    base: Tensor, other: Tensor, t: float, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Interpolation whose share of the other model falls with the distance: ``out = s · other + (1 − s) · base``.

    ``s = clamp(t · (1 / max(|base − other|, 1e-6)), 0, 1)``.

    Args:
        base, other: [...] of one shape; dtypes may differ.
        t: the distance up to which the other model is taken whole.
        dtype: of the result; default: base's. out: filled and returned when given (it may be one of the inputs).

    Numerics: class A: float32 (float64 when an input is), a reciprocal and a product, rounded once at the end. NaN stays.
    Cost: two reads and one write of N elements, 7N flops, no workspace.
    Raises: TypeError for non-float tensors; ValueError for shapes that differ or a t that is not finite.
    Source: mergekit's nearswap.
    """
    _check(base, other, t)
    result = result_like("nearswap", base, dtype, out)
    wide = compute_dtype(base, other)
    a, b = base.to(wide), other.to(wide)
    share = ((a - b).abs().clamp(min=1e-6).reciprocal() * torch.tensor(t, dtype=wide, device="cpu")).clamp(0.0, 1.0)
    return result.copy_(share * b + (1.0 - share) * a)


@nearswap.backend("cpu", when=lambda base, other, *_, **__: _native.cpu_why_not(base, other))
def _nearswap_cpu(
    base: Tensor, other: Tensor, t: float, *, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    _check(base, other, t)
    result = result_like("nearswap", base, dtype, out)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
    inputs = base.contiguous(), other.contiguous()
    arrays = [value for x in inputs for value in (x.data_ptr(), _native.DTYPES[x.dtype])]
    _native.lib().nearswap(
        dense.data_ptr(), _native.DTYPES[dense.dtype], *arrays, dense.numel(), float(t), _native.threads()
    )
    return dense if dense is result else result.copy_(dense)


@nearswap.case("odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base = torch.randn(131, 257, generator=g)
    return (base.to(dtype), (base + 0.1 * torch.randn(131, 257, generator=g)).to(dtype), 0.05), {}


@nearswap.case("another dtype out, negative t", torch.bfloat16, torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*(torch.randn(70, generator=g).to(dtype) for _ in range(2)), -0.5), {"dtype": torch.float16}


@nearswap.case("special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([0.0, -0.0, 1.0, nan, inf, inf, 1.0, 1e-40, 0.0]).to(dtype)
    other = torch.tensor([-0.0, -0.0, nan, 1.0, inf, -inf, inf, -1e-40, 1e-7]).to(dtype)
    return (base, other, 1e-3), {}


@nearswap.case("empty", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.zeros(0, 3, dtype=dtype), torch.zeros(0, 3, dtype=dtype), 0.1), {}


@nearswap.case("0-d", torch.float32, torch.float16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.tensor(1.5, dtype=dtype), torch.tensor(1.25, dtype=dtype), 0.125), {}

"""sce_variance: how much models differ at each element, the score that SCE selects by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, float_deltas, require_family
from .threshold import native_arrays


def variance_of(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance over the deltas, exactly 0 where they are all equal: deviations are taken from the first."""
    shifted = [d - deltas[0] for d in deltas[1:]]
    # A divisor on the inputs' device: by a number, a GPU multiplies by its reciprocal.
    count = torch.tensor(len(deltas), dtype=deltas[0].dtype, device=deltas[0].device)
    mean = torch.zeros_like(deltas[0])
    for s in shifted:
        mean = mean + s
    mean = mean / count
    squares = mean * mean  # the first one's own deviation
    for s in shifted:
        squares = squares + (s - mean) * (s - mean)
    return squares / count


@op(numerics="A", kind="elementwise")
def sce_variance(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    """Population variance of the deltas over the models, element by element.

    ``out = (m² + Σᵢ (sᵢ − m)²) / K`` with sᵢ = δᵢ − δ₀ for i >= 1, m = Σᵢ sᵢ / K and δᵢ = modelᵢ − base: exactly 0
    where all models are equal.

    Args:
        base: [...] any shape. models: K >= 1 tensors of its shape; dtypes may differ.

    Returns: float32 of base's shape, float64 when an input is.
    Numerics: class A: float32 (float64 when an input is), models in list order, IEEE division.
    Cost: K + 1 reads and one write of N elements, about 6KN flops, no workspace.
    Raises: TypeError for non-float tensors, ValueError for an empty list or shapes that differ.
    Source: SCE (arXiv:2408.07990), §3.2.
    """
    require_family("sce_variance", base, models)
    return variance_of(float_deltas(base, models))


@sce_variance.backend("cpu", when=lambda base, models: _native.cpu_why_not(base, *models))
def _sce_variance_cpu(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    require_family("sce_variance", base, models)
    arrays = native_arrays(base, models)
    out = _native.fresh(base.shape, compute_dtype(base, *models))
    _native.lib().sce_variance(out.data_ptr(), *arrays.arguments, arrays.n, _native.threads())
    return out


def family_case(
    g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], count: int
) -> tuple[Tensor, list[Tensor]]:
    """A base and models of which about a third of the elements are untouched."""
    base = torch.randn(shape, generator=g)
    moved = [
        base + 0.1 * torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.7) for _ in range(count)
    ]
    return base.to(dtype), [m.to(dtype) for m in moved]


def special_case(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Zeros of both signs, NaN, Inf, tiny and large deltas."""
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([0.0, -0.0, 1.0, nan, inf, 1.0, 0.0, 1e-40, -0.0], device="cpu")
    a = torch.tensor([-0.0, 0.0, nan, 1.0, inf, -inf, 6e4, -1e-40, -0.0], device="cpu")
    b = torch.tensor([0.0, -0.0, 2.0, 1.0, 1.0, 1.0, -6e4, 1e-20, 1.0], device="cpu")
    return base.to(dtype), [a.to(dtype), b.to(dtype), base.to(dtype)]


@sce_variance.case("three models, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (131, 257), 3), {}


@sce_variance.case("one model", torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (77,), 1), {}


@sce_variance.case("special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return special_case(dtype), {}


@sce_variance.case("empty", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (0, 3), 2), {}


@sce_variance.case("0-d", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (), 2), {}

"""ram_merge: where one model alone changed an element its delta is kept whole, where several did their mean is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, float_deltas, per_model, result_like
from .ram_counts import changed_by, check_epsilon
from .sce_variance import family_case, special_case
from .threshold import native_arrays


def _factors(base: Tensor, models: Sequence[Tensor], factor: float | Sequence[float], epsilon: float) -> list[float]:
    check_epsilon("ram_merge", base, models, epsilon)
    factors = per_model("ram_merge", "factor", factor, len(models))
    if not all(math.isfinite(f) for f in factors):
        raise ValueError(f"ram_merge: factor {factors} is not finite")
    return factors


@op(numerics="A", kind="elementwise")
def ram_merge(
    base: Tensor,
    models: Sequence[Tensor],
    factor: float | Sequence[float] = 1.0,
    epsilon: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What one model alone changed, times its factor, or the mean of what several changed, added to the base.

    ``out = base + (Σ fᵢ δᵢ cᵢ) / max(Σ cᵢ, 1)`` with δᵢ = modelᵢ − base, cᵢ = 1 where |δᵢ| > epsilon, and fᵢ the model's
    factor where it alone changed the element, 1 elsewhere.

    Args:
        base: [...] any shape. models: K >= 1 tensors of its shape; dtypes may differ.
        factor: one number, or one per model. epsilon: >= 0.
        dtype: of the result; default: base's. out: filled and returned when given (it may be one of the inputs).

    Numerics: class A. float32 (float64 when an input is), models in list order, one division, rounded once at the end. A
        NaN delta changes nothing.
    Cost: K + 1 reads and one write of N elements, about 8KN flops, no workspace.
    Raises: TypeError for non-float tensors; ValueError for an empty list, shapes that differ, a wrong number of factors,
        one that is not finite, or a negative epsilon.
    Source: RAM and RAM+, as mergekit's ram and ramplus_tl.
    """
    factors = _factors(base, models, factor, epsilon)
    result = result_like("ram_merge", base, dtype, out)
    wide = compute_dtype(base, *models)
    deltas = float_deltas(base, models)
    changed, count = changed_by(deltas, epsilon)
    alone = count == 1
    total = torch.zeros_like(deltas[0])
    for d, c, f in zip(deltas, changed, factors, strict=True):
        total = total + torch.where(c, torch.where(alone, d * torch.tensor(f, dtype=wide, device="cpu"), d), 0.0)
    return result.copy_(base.to(wide) + total / count.clamp(min=1))


@ram_merge.backend("cpu", when=lambda base, models, *_, **__: _native.cpu_why_not(base, *models))
def _ram_merge_cpu(
    base: Tensor,
    models: Sequence[Tensor],
    factor: float | Sequence[float] = 1.0,
    epsilon: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    factors = _factors(base, models, factor, epsilon)
    result = result_like("ram_merge", base, dtype, out)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
    arrays = native_arrays(base, models)
    _native.lib().ram_merge(
        dense.data_ptr(), _native.DTYPES[dense.dtype], *arrays.arguments, arrays.n, factors, epsilon, _native.threads()
    )
    return dense if dense is result else result.copy_(dense)


@ram_merge.case("three models, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (131, 257), 3), [1.0, 1.25, 0.9], 0.05), {}


@ram_merge.case("special values, nothing too small")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*special_case(dtype), 1.0, 0.0), {}


@ram_merge.case("one model, another dtype out", torch.bfloat16, torch.float64)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (77,), 1), 1.5), {"dtype": torch.float16}


@ram_merge.case("empty", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (0, 3), 2), {}


@ram_merge.case("0-d", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (), 2), {}

"""sce_merge: SCE's last step: elect a sign per element, average the deltas that agree, leave the unselected alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, float_deltas, per_model, require_family, result_like
from .sce_energy import median_rule, native_rule
from .sce_variance import family_case, special_case, variance_of
from .threshold import KEEP_NONE, Threshold, kept, native_arrays


def _check(base: Tensor, models: Sequence[Tensor], weight: float | Sequence[float], offset: int) -> list[float]:
    require_family("sce_merge", base, models)
    if offset < 0:
        raise ValueError(f"sce_merge: offset {offset} is negative")
    weights = per_model("sce_merge", "weight", weight, len(models))
    if any(not 0.0 <= w < float("inf") for w in weights):
        raise ValueError(f"sce_merge: weights {weights} must be finite and >= 0: they are shares")
    return weights


@op(numerics="A", kind="elementwise")
def sce_merge(
    base: Tensor,
    models: Sequence[Tensor],
    weight: float | Sequence[float],
    rule: Threshold | None = None,
    *,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The weighted mean of the deltas whose sign agrees with their sum, added to the base, where the variance is kept.

    ``out = base + (Σ wᵢδᵢ aᵢ) / max(Σ wᵢ aᵢ, 1e-6)`` where the rule keeps the element's :func:`sce_variance`, and base
    elsewhere; δᵢ = modelᵢ − base, and aᵢ = 1 where δᵢ is not 0 and its sign is that of Σ δᵢ (+ where that is 0).

    Args:
        base: [...] any shape. models: K >= 1 tensors of its shape; dtypes may differ.
        weight: one number >= 0, or one per model.
        rule: of the variance, as :func:`topk_thresholds` gives it for the whole tensor; None keeps all.
        offset: flat index of the first element within the whole tensor.
        dtype: of the result; default: base's. out: filled and returned when given (it may be one of the inputs).

    Numerics: class A. float32 (float64 when an input is), models in list order, one division, rounded once at the end. A
        NaN delta takes part, so that it shows.
    Cost: K + 1 reads and one write of N elements, about 12KN flops, no workspace.
    Raises: TypeError for non-float tensors; ValueError for an empty list, shapes that differ, or a wrong number of weights
        or one that is negative.
    Source: SCE (arXiv:2408.07990), §3.2 to 3.4, as mergekit merges.
    """
    weights = _check(base, models, weight, offset)
    result = result_like("sce_merge", base, dtype, out)
    wide = compute_dtype(base, *models)
    deltas = float_deltas(base, models)
    total = deltas[0]
    for d in deltas[1:]:
        total = total + d
    positive = total >= 0
    above, below = torch.zeros_like(total), torch.zeros_like(total)
    for d, w in zip(deltas, weights, strict=True):
        share = torch.tensor(w, dtype=wide, device="cpu")
        agrees = torch.where(positive, ~(d <= 0), ~(d >= 0))
        above = above + torch.where(agrees, d * share, 0.0)
        below = below + torch.where(agrees, share, 0.0)
    merged = above / below.clamp(min=1e-6)
    if rule is not None:
        merged = torch.where(kept(variance_of(deltas), rule, offset), merged, 0.0)
    return result.copy_(base.to(wide) + merged)


@sce_merge.backend("cpu", when=lambda base, models, *_, **__: _native.cpu_why_not(base, *models))
def _sce_merge_cpu(
    base: Tensor,
    models: Sequence[Tensor],
    weight: float | Sequence[float],
    rule: Threshold | None = None,
    *,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    weights = _check(base, models, weight, offset)
    result = result_like("sce_merge", base, dtype, out)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
    arrays = native_arrays(base, models)
    _native.lib().sce_merge(
        dense.data_ptr(), _native.DTYPES[dense.dtype], *arrays.arguments, arrays.n, weights, *native_rule(rule), offset,
        _native.threads(),
    )  # fmt: skip
    return dense if dense is result else result.copy_(dense)


@sce_merge.case("three models, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (131, 257), 3), [0.2, 0.5, 0.3]), {}


@sce_merge.case("selected, a later part")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = family_case(g, dtype, (97, 129), 4)
    return (base, models, [0.1, 0.2, 0.3, 0.4], median_rule(base, models, 1001)), {"offset": 1001}


@sce_merge.case("one model, another dtype out", torch.bfloat16, torch.float64)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (77,), 1), 1.0), {"dtype": torch.float16}


@sce_merge.case("special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*special_case(dtype), 0.25, Threshold(0, 7)), {}


@sce_merge.case("none selected, and 0-d", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (), 2), 0.5, KEEP_NONE), {}


@sce_merge.case("empty", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (0, 3), 2), 0.5), {}

"""weighted_sum: linear merging and task arithmetic, one pass over the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Call, op
from ._checks import compute_dtype, per_model, require_float, require_like, result_like


def _scalars(
    base: Tensor | None, models: Sequence[Tensor], weight: float | Sequence[float] | Tensor, normalize: bool
) -> tuple[list[float], float]:
    """Validated weights, and the divisor (1.0 when not normalising)."""
    if not models:
        raise ValueError("weighted_sum: models is empty")
    if base is not None:
        require_float("weighted_sum", base=base)
    require_like("weighted_sum", base if base is not None else models[0], models)
    weights = per_model("weighted_sum", "weight", weight, len(models))
    total = 0.0
    for w in weights:
        total += w
    if not normalize:
        return weights, 1.0
    if base is not None:
        return weights, total if abs(total) >= 1e-8 else 1.0
    if abs(total) < 1e-8:
        raise ValueError(f"weighted_sum: the weights {weights} sum to {total}; normalize needs a non-zero sum")
    return weights, total


@op(numerics="A", kind="elementwise")
def weighted_sum(
    base: Tensor | None,
    models: Sequence[Tensor],
    weight: float | Sequence[float] | Tensor,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    add_base: bool = True,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A weighted sum of models, or of their deltas added to a base.

    With a base: ``out = base + scale · (Σᵢ wᵢ (modelᵢ − base)) / D``; without: ``out = scale · (Σᵢ wᵢ modelᵢ) / D``.
    D = Σ wᵢ when `normalize` (with a base, 1 where |Σ wᵢ| < 1e-8), else 1.

    Args:
        base: [...] any shape, or None.
        models: K >= 1 tensors of base's shape; dtypes may differ.
        weight: one number, or one per model.
        add_base: False gives the weighted delta alone, without the base.
        dtype: of the result; default: base's, else the first model's.
        out: filled and returned when given (it may be one of the inputs).

    Numerics: class A. Arithmetic in float32 (float64 when an input is float64), no contraction, models in list order,
    one division by D, one product with `scale`, rounded once at the end. NaN and Inf follow IEEE.
    Cost: K + 1 reads and one write of N elements, 3KN flops, no workspace.
    Raises: TypeError for non-float tensors; ValueError for an empty list, shapes that differ, a wrong number of
        weights, or weights that sum to zero when normalising without a base.
    Source: model soups (arXiv:2203.05482); task arithmetic (arXiv:2212.04089), eq. 2.
    """
    weights, divisor = _scalars(base, models, weight, normalize)
    like = base if base is not None else models[0]
    result = result_like("weighted_sum", like, dtype, out)
    compute = compute_dtype(*models, *([] if base is None else [base]))
    origin = None if base is None else base.to(compute)
    total: Tensor | None = None
    for m, w in zip(models, weights, strict=True):
        x = m.to(compute)
        term = (x if origin is None else x - origin) * torch.tensor(w, dtype=compute, device="cpu")
        total = term if total is None else total + term
    assert total is not None
    if normalize:
        total = total / torch.tensor(divisor, dtype=compute, device=total.device)
    if scale != 1.0:
        total = total * torch.tensor(scale, dtype=compute, device="cpu")
    if origin is not None and add_base:
        total = origin + total
    if torch.is_grad_enabled() and total.requires_grad and out is None:
        return total.to(result.dtype)
    return result.copy_(total)


@weighted_sum.backend(
    "cpu", when=lambda base, models, weight, **_: _native.cpu_why_not(*models, *([] if base is None else [base]))
)
def _weighted_sum_cpu(
    base: Tensor | None,
    models: Sequence[Tensor],
    weight: float | Sequence[float] | Tensor,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    add_base: bool = True,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    weights, divisor = _scalars(base, models, weight, normalize)
    result = result_like("weighted_sum", base if base is not None else models[0], dtype, out)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
    inputs = [m.contiguous() for m in ([] if base is None else [base]) + list(models)]
    _native.lib().weighted_sum(
        dense.data_ptr(),
        _native.DTYPES[dense.dtype],
        [t.data_ptr() for t in inputs],
        [_native.DTYPES[t.dtype] for t in inputs],
        dense.numel(),
        base is not None,
        add_base,
        weights,
        normalize,
        divisor,
        scale,
        _native.threads(),
    )
    return dense if dense is result else result.copy_(dense)


@weighted_sum.backend("triton", when=lambda base, models, weight, **_: _triton.why_not(base, *models))
def _weighted_sum_triton(base, models, weight, *, normalize=False, scale=1.0, add_base=True, dtype=None, out=None):  # type: ignore[no-untyped-def]
    weights, divisor = _scalars(base, models, weight, normalize)
    result = result_like("weighted_sum", base if base is not None else models[0], dtype, out)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device=result.device)
    divide_by = divisor if normalize else None
    _triton.kernel("weighted_sum")(base, models, weights, divide_by, scale, dense, add_base=add_base)
    return dense if dense is result else result.copy_(dense)


@weighted_sum.many("triton")
def _weighted_sum_triton_many(calls: Sequence[Call]) -> list[Tensor]:
    results: list[Tensor] = []
    groups: dict[bool, list[Any]] = {}
    for args, kwargs in calls:
        p = weighted_sum.signature.bind(*args, **kwargs)
        p.apply_defaults()
        base, models, weight, normalize, scale, add_base, dtype, out = p.arguments.values()
        weights, divisor = _scalars(base, models, weight, normalize)
        results.append(result_like("weighted_sum", base if base is not None else models[0], dtype, out))
        dense = results[-1] if results[-1].is_contiguous() else torch.empty_like(results[-1]).contiguous()
        job = (base, models, weights, divisor if normalize else None, scale, dense)
        groups.setdefault(add_base, []).append((job, results[-1]))
    for add_base, group in groups.items():
        _triton.kernel("weighted_sum", "weighted_sum_many")([job for job, _ in group], add_base=add_base)
        for job, result in group:
            if job[-1] is not result:
                result.copy_(job[-1])
    return results


def _models(g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]


@weighted_sum.case("deltas of three models, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, *models = _models(g, dtype, (131, 257), 4)
    return (base, models, [0.3, -0.7, 1.1]), {"scale": 0.9}


@weighted_sum.case("deltas alone")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, *models = _models(g, dtype, (77, 129), 3)
    return (base, models, [0.5, -1.5]), {"add_base": False}


@weighted_sum.case("linear, normalised")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, _models(g, dtype, (70001,), 3), [0.2, 0.5, 0.4]), {"normalize": True}


@weighted_sum.case("empty")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, _models(g, dtype, (0, 4), 2), 0.5), {}


@weighted_sum.case("0-d, one model")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, model = _models(g, dtype, (), 2)
    return (base, [model], 0.3), {}


@weighted_sum.case("special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-40, 65504.0]).to(dtype)
    model = torch.tensor([-0.0, -0.0, float("inf"), 1.0, -1e-40, 65504.0]).to(dtype)
    return (base, [model, base], [1.0, 0.5]), {"scale": 2.0}

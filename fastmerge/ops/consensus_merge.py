"""consensus_merge: trim, elect a sign, merge what agrees: TIES, DARE, breadcrumbs and DELLA in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Call, op
from ._checks import result_like
from ._consensus_plan import ConsensusPlan, make_plan, native_trims
from ._consensus_triton import triton_job
from .random_mask import row_length
from .rescale import delta_sums, factors_of, keep_mask, reference_sums
from .threshold import Rule, Threshold, native_arrays, reference_thresholds, topk_thresholds


@op(numerics="A", kind="elementwise")
def consensus_merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    weight: float | Sequence[float] | Tensor,
    density: float | Sequence[float] = 1.0,
    *,
    trim: str | None = "topk",
    gamma: float | Sequence[float] = 0.0,
    epsilon: float | Sequence[float] = 0.0,
    elect: str | None = "sum",
    normalize: bool = False,
    rescale: str | None = None,
    factors: Sequence[float] | None = None,
    scale: float = 1.0,
    thresholds: Sequence[Rule] | None = None,
    seed: int = 0,
    name: str = "",
    offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Merge K deltas: trim each, elect a sign per element, add the deltas that agree to the base.

    With δᵢ = modelᵢ − base (the model itself without a base), mᵢ the 0/1 trim mask, fᵢ the rescale factor and
    ``uᵢ = δᵢ · (wᵢ fᵢ)`` where mᵢ, else 0::

        s   = +1 where Σᵢ uᵢ >= 0 else −1            (elect "count": Σᵢ sign(uᵢ))
        m   = Σᵢ uᵢ over the models with sign(uᵢ) = s   (elect None: over all)
        D   = Σᵢ wᵢ over the same models, 0 → 1         (elect None: Σᵢ wᵢ, 1 where |Σᵢ wᵢ| < 1e-8)
        out = base + scale · m / D                      (D only with normalize)

    Trim masks: "topk" keeps the int(density·N) largest |δ| (:func:`topk_mask`); "window" drops the int(gamma·N) largest
    first (:func:`window_counts`); "random" and "rank_random" are :func:`random_mask` with stream = i, the latter with
    `epsilon`; None keeps everything. Rescale: "density" is 1/density, "l1" is ‖δ‖₁/‖δ'‖₁ (1 where either < 1e-7).

    Args:
        base: [...] any shape, or None.
        models: K >= 1 tensors of base's shape; dtypes may differ.
        weight, density, gamma, epsilon: one number, or one per model.
        factors: fᵢ computed earlier (a chunk of a tensor can not know its norms); they replace `rescale`.
        thresholds: per model the Threshold or Window of the whole tensor (None keeps all), instead of computing them;
            needed with an offset.
        seed, name: of the random masks.
        offset: flat index of the first element within the whole tensor, for the index of thresholds and random masks.
        dtype, out: as in :func:`weighted_sum`.

    Numerics: class A (float32, float64 when an input is; models in list order; the products wᵢ fᵢ are rounded once to
    the compute dtype), except fᵢ of rescale="l1": float64 sums in fixed order, class B. A NaN delta that is kept takes
    part in every election, so that it shows in the output.
    Cost: K + 1 reads and one write of N elements with thresholds; about twice the reads without; no delta is stored.
    Raises: TypeError for non-float tensors; ValueError for an empty list, shapes that differ, a wrong number of scalars,
        scalars out of range, unknown names, or an offset without thresholds where they are needed.
    Source: TIES (arXiv:2306.01708), §4; DARE (arXiv:2311.03099); breadcrumbs (arXiv:2312.06795); DELLA
        (arXiv:2406.11617).
    """
    plan = make_plan(
        base, models, weight, density, trim=trim, gamma=gamma, epsilon=epsilon, elect=elect, normalize=normalize,
        rescale=rescale, factors=factors, thresholds=thresholds, seed=seed, name=name, offset=offset,
    )  # fmt: skip
    result = result_like("consensus_merge", base if base is not None else models[0], dtype, out)
    origin = None if base is None else base.to(plan.compute)
    deltas = [m.to(plan.compute) if origin is None else m.to(plan.compute) - origin for m in models]
    rules, factors = _resolved(plan, None, deltas, offset, reference_thresholds, reference_sums)
    terms = _terms(deltas, plan, rules, factors, offset)
    total, divisor = _elected(terms, plan, elect)
    if normalize:
        total = total / divisor
    if scale != 1.0:
        total = total * torch.tensor(scale, dtype=plan.compute, device="cpu")
    if origin is not None:
        total = origin + total
    if torch.is_grad_enabled() and total.requires_grad and out is None:
        return total.to(result.dtype)
    return result.copy_(total)


def _resolved(
    plan: ConsensusPlan,
    base: Tensor | None,
    models: Sequence[Tensor],
    offset: int,
    thresholds: Callable[..., list[Rule]],
    sums: Callable[..., Tensor],
) -> tuple[list[Rule] | None, list[float]]:
    """(rules, factors) of a call: those given, or computed by the backend's own functions."""
    rules = plan.rules
    if rules is None and plan.selects:
        rules = thresholds(base, models, plan.densities, plan.gammas)
    if plan.factors is not None:
        return rules, plan.factors
    return rules, factors_of([sums(plan, base, models, rules, offset)], len(models))


def _native_thresholds(
    base: Tensor | None, models: Sequence[Tensor], density: list[float], gamma: list[float] | None
) -> list[Rule]:
    return topk_thresholds(base, models, density, gamma=gamma)


def _terms(
    deltas: list[Tensor], plan: ConsensusPlan, rules: list[Rule] | None, factors: list[float], offset: int
) -> list[Tensor]:
    """The uᵢ: +0 where trimmed away, else the delta times float(weight · factor)."""
    terms = []
    for i, delta in enumerate(deltas):
        coefficient = torch.tensor(plan.weights[i] * factors[i], dtype=plan.compute, device="cpu")
        terms.append(torch.where(keep_mask(plan, i, delta, rules, offset), delta * coefficient, 0.0))
    return terms


def _elected(terms: list[Tensor], plan: ConsensusPlan, elect: str | None) -> tuple[Tensor, Tensor]:
    """(sum over the models that take part, divisor), adding in list order."""
    if elect is None:
        total = terms[0]
        for u in terms[1:]:
            total = total + u
        return total, torch.tensor(plan.divisor, dtype=plan.compute, device=total.device)
    votes = terms if elect == "sum" else [(u > 0).to(u.dtype) - (u < 0).to(u.dtype) for u in terms]
    vote = votes[0]
    for v in votes[1:]:
        vote = vote + v
    positive = vote >= 0
    merged: Tensor | None = None
    divisor: Tensor | None = None
    for u, w in zip(terms, plan.weights, strict=True):
        agrees = torch.where(positive, ~(u <= 0), ~(u >= 0))
        part = torch.where(agrees, u, 0.0)
        share = torch.where(agrees, torch.tensor(w, dtype=plan.compute, device="cpu"), 0.0)
        merged = part if merged is None else merged + part
        divisor = share if divisor is None else divisor + share
    assert merged is not None
    assert divisor is not None
    return merged, torch.where(divisor == 0, 1.0, divisor)


@consensus_merge.backend(
    "cpu", when=lambda base, models, *_, **__: _native.cpu_why_not(*models, *([] if base is None else [base]))
)
def _consensus_merge_cpu(
    base: Tensor | None,
    models: Sequence[Tensor],
    weight: float | Sequence[float] | Tensor,
    density: float | Sequence[float] = 1.0,
    *,
    trim: str | None = "topk",
    gamma: float | Sequence[float] = 0.0,
    epsilon: float | Sequence[float] = 0.0,
    elect: str | None = "sum",
    normalize: bool = False,
    rescale: str | None = None,
    factors: Sequence[float] | None = None,
    scale: float = 1.0,
    thresholds: Sequence[Rule] | None = None,
    seed: int = 0,
    name: str = "",
    offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    plan = make_plan(
        base, models, weight, density, trim=trim, gamma=gamma, epsilon=epsilon, elect=elect, normalize=normalize,
        rescale=rescale, factors=factors, thresholds=thresholds, seed=seed, name=name, offset=offset,
    )  # fmt: skip
    result = result_like("consensus_merge", base if base is not None else models[0], dtype, out)
    base = None if base is None else base.contiguous()
    models = [m.contiguous() for m in models]
    rules, found = _resolved(plan, base, models, offset, _native_thresholds, delta_sums)
    arrays = native_arrays(base, models)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
    _native.lib().consensus_merge(
        dense.data_ptr(),
        _native.DTYPES[dense.dtype],
        *arrays.arguments,
        arrays.n,
        native_trims(plan, models[0], rules, found),
        max(1, row_length(models[0])),
        *plan.key,
        (None, "sum", "count").index(elect),
        normalize,
        plan.divisor,
        scale,
        offset,
        _native.threads(),
    )
    return dense if dense is result else result.copy_(dense)


def _triton_when(base, models, *_, rescale=None, factors=None, trim="topk", **__):  # type: ignore[no-untyped-def]
    tensors = [*models, *([] if base is None else [base])]
    if rescale == "l1" and factors is None and trim is not None and any(t.dtype == torch.float64 for t in tensors):
        return "rescale='l1' of float64 deltas: the last bit of the norms is not the reference's there; pass factors"
    return _triton.why_not(*tensors)


def _triton_call(
    base: Tensor | None,
    models: Sequence[Tensor],
    weight: float | Sequence[float] | Tensor,
    density: float | Sequence[float] = 1.0,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Any]:
    """(the result, the job that fills it or its dense copy)."""
    options = {k: p.default for k, p in consensus_merge.signature.parameters.items() if p.kind is p.KEYWORD_ONLY}
    options.update(arguments)
    scale = options.pop("scale")
    plan = make_plan(base, models, weight, density, **{k: v for k, v in options.items() if k not in ("dtype", "out")})
    result = result_like("consensus_merge", base if base is not None else models[0], dtype, out)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device=result.device)
    return result, triton_job(
        base, models, dense, plan, options["elect"], options["normalize"], scale, options["offset"]
    )


@consensus_merge.backend("triton", when=_triton_when)
def _consensus_merge_triton(*args, **kwargs):  # type: ignore[no-untyped-def]
    return _consensus_merge_triton_many([(args, kwargs)])[0]


@consensus_merge.many("triton")
def _consensus_merge_triton_many(calls: Sequence[Call]) -> list[Tensor]:
    made = [_triton_call(*args, **kwargs) for args, kwargs in calls]
    _triton.kernel("consensus_merge", "consensus_merge_many")([job for _, job in made])
    return [result if job.out is result else result.copy_(job.out) for result, job in made]


def _models(g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(count)]


def _family(g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> tuple[Tensor, list[Tensor]]:
    """A base and models near it, so that bfloat16 deltas are full of ties."""
    base = torch.randn(shape, generator=g) * 0.02
    return base.to(dtype), [(base + torch.randn(shape, generator=g) * 0.002).to(dtype) for _ in range(count)]


@consensus_merge.case("ties, four models")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = _family(g, dtype, (263, 517), 4)
    return (base, models, [1.0, 0.5, 0.7, 0.3], 0.2), {"normalize": True}


@consensus_merge.case("ties by count, densities and weights differ")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = _family(g, dtype, (40_003,), 3)
    return (base, models, [0.4, -0.3, 0.9], [0.5, 1.0, 0.0]), {"elect": "count", "scale": 0.7}


@consensus_merge.case("given thresholds, a chunk")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = _family(g, dtype, (6001,), 3)
    rules = reference_thresholds(base, models, [0.3, 0.2, 0.1])
    shifted = [Threshold(r.key, r.index + 10_000) for r in rules if isinstance(r, Threshold)]
    return (base, models, 1.0), {"thresholds": shifted, "offset": 10_000, "normalize": True}


@consensus_merge.case("breadcrumbs with election")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = _family(g, dtype, (131, 257), 2)
    return (base, models, [0.6, 0.4], 0.5), {"trim": "window", "gamma": [0.01, 0.1]}


@consensus_merge.case("breadcrumbs without election, l1")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = _family(g, dtype, (300, 301), 2)
    return (base, models, 0.5, 0.9), {"trim": "window", "gamma": 0.2, "elect": None, "rescale": "l1"}


@consensus_merge.case("dare_ties")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = _family(g, dtype, (131, 257), 3)
    return (base, models, [0.6, 0.4, 0.2], 0.3), {"trim": "random", "rescale": "l1", "seed": 5, "name": "a.weight"}


@consensus_merge.case("dare_linear, a chunk")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = _family(g, dtype, (5003,), 3)
    arguments = {"trim": "random", "rescale": "density", "elect": None, "offset": 77_777, "seed": 1, "name": "b"}
    return (base, models, [0.6, 0.4, 0.2], [0.3, 0.5, 1.0]), arguments


@consensus_merge.case("della")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = _family(g, dtype, (61, 257), 3)
    arguments = {"trim": "rank_random", "epsilon": [0.1, 0.2, 0.05], "rescale": "l1", "normalize": True, "name": "c"}
    return (base, models, 1.0, [0.3, 0.5, 1.0]), arguments


@consensus_merge.case("no base, nine models")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, _models(g, dtype, (70, 71), 9), 1.0, 0.25), {"normalize": True}


@consensus_merge.case("weights that cancel", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, *models = _models(g, dtype, (999,), 4)
    return (base, models, [0.5, -0.5, 0.0]), {"normalize": True, "trim": None}


@consensus_merge.case("special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    inf, nan = float("inf"), float("nan")
    base = torch.tensor([0.0, -0.0, inf, nan, 1e-40, 1.0, 2.0, 0.0, -0.0, 3.0]).to(dtype)
    a = torch.tensor([-0.0, 0.0, inf, 1.0, -1e-40, nan, inf, 1.0, -0.0, -inf]).to(dtype)
    b = torch.tensor([0.0, -0.0, 1.0, 1.0, 2e-40, 5.0, 3.0, -1.0, 0.0, inf]).to(dtype)
    return (base, [a, b], [1.0, 1.0], 0.7), {"normalize": True, "scale": 2.0}


@consensus_merge.case("empty", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, *models = _models(g, dtype, (0, 4), 3)
    return (base, models, 1.0, 0.2), {}


@consensus_merge.case("0-d", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, *models = _models(g, dtype, (), 3)
    return (base, models, 1.0, 0.2), {"normalize": True}

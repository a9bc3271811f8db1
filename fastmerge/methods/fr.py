"""FR-Merging: task vectors without their low frequencies, weighted by their mean magnitude."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from .. import _native, ops
from ..errors import BadInput
from ..ops._highpass_cpu import LANES
from ..ops.abs_sum import BLOCK
from ..ops.highpass_filter import bytes_held, fused_merge, fuses, two_passes
from ._fr_rules import Rule, resolve
from ._method import Context, Header, Help, PerModel, Range, TensorStream, method


@dataclass(frozen=True)
class Magnitudes:
    """E of every model: the mean of |delta| over the elements of all filtered tensors."""

    means: tuple[float, ...]


@method(paper="arXiv:2411.16815", grain="stream", one_call=True)
def fr(
    tensor: TensorStream,
    *,
    lambda_: Annotated[PerModel[float | None], Help("factor of every coefficient (default 1)")] = None,
    lambda_policy: Annotated[
        Literal["mean", "constant", "align"] | None,
        Help("coefficients E_i / sum E (mean, default), 1 (constant) or max E / E_i (align); E = mean of |delta|"),
    ] = None,
    scope: Annotated[
        Literal["model", "tensor"] | None, Help("E over all filtered tensors (model, default) or over each tensor")
    ] = None,
    mask: Annotated[
        Literal["radial", "disc_min", "disc_max"] | None, Help("high-pass around DC (radial, default) or as published")
    ] = None,
    cutoff: Annotated[float | None, Range(0.0), Help("default 0.1 (radial), 0.7 (disc_min), 0.6 (disc_max)")] = None,
    ring_double: Annotated[bool | None, Help("double the published masks' ring of radius min(H, W) // 10")] = None,
    select: Annotated[str | None, Help("regular expression found in the names to filter (default: all)")] = None,
    preset: Annotated[
        Literal["vit8", "vit30", "roberta", "lm", "llm"] | None, Help("a published script; other keys override it")
    ] = None,
    reference_bugs: Annotated[bool, Help("with a preset: reproduce that script's known bugs too")] = False,
    context: Context,
) -> None:
    """θ0 + Σ λᵢ·G(θᵢ − θ0), G the high-pass filter of every two-dimensional tensor.

    λᵢ = λ·Eᵢ/Σ Eⱼ with E the mean magnitude of a model's delta over all filtered tensors (`scope: tensor`: over this
    one). Where Σ Eⱼ is 0 the coefficients are λ/K; with `align` a zero delta gets coefficient 0. Tensors that are not
    filtered get Σ λᵢ·(θᵢ − θ0). The filter is linear, so that it is applied once, to the weighted sum.

    Presets are the published scripts' masks, selections and constants; names that a preset does not merge stay at the
    base. `reference_bugs`: vit8 gives attention and MLP biases the first model's delta only, and a zero delta NaN;
    llm does its arithmetic in the base's dtype.
    """
    rule = resolve(tensor.parameters)
    if not rule.takes(tensor.name, tensor.shape):
        tensor.merge_each(lambda offset, base, models, out: _given(base))
        return
    filtered = rule.filters(tensor.name, tensor.shape)
    if not rule.linear:
        (_elected if rule.elect else _aligned)(tensor, rule, lambdas_of(lambda_, rule, tensor.count), filtered)
        return
    means = context.state if rule.scope == "tensor" else context.plan.means if context.plan is not None else None
    weights = coefficients(rule, lambdas_of(lambda_, rule, tensor.count), means, tensor.count)
    if not filtered:
        tensor.merge_each(
            lambda offset, base, models, out: ops.weighted_sum(base, models, weights, dtype=tensor.out_dtype, out=out)
        )
        return
    if tensor.in_one_call(fuses):
        _merge_at_once(tensor, rule, weights)
        return
    if not tensor.collects("delta", tensor.compute) and _in_two_passes(tensor, rule, weights):
        return
    delta = tensor.collect(
        "delta",
        lambda offset, base, models, out: ops.weighted_sum(base, models, weights, add_base=False, out=out),
        tensor.compute,
        then=lambda whole: _filter(whole, rule),
    )
    tensor.emit(delta, add_base=True)


@fr.check
def _check(tensors: Sequence[Header]) -> None:
    count: int | None = None
    for tensor in tensors:
        rule = resolve(tensor.parameters)
        if not (rule.measured and rule.scope == "model" and rule.filters(tensor.name, tensor.shape)):
            continue
        count = len(tensor.models) if count is None else count
        if len(tensor.models) != count:
            raise BadInput(
                f"tensor {tensor.name!r} merges {len(tensor.models)} models, others {count}",
                remedy="coefficients of whole models need the same models everywhere: add scope: tensor",
            )


@fr.memory
def _memory(tensors: Sequence[Header]) -> int:
    """The most that one tensor takes: its thin spectrum, or the whole matrix where it does not go by rows."""
    return max((_bytes(t) for t in tensors), default=0)


def _bytes(tensor: Header) -> int:
    rule = resolve(tensor.parameters)
    if not rule.takes(tensor.name, tensor.shape):
        return 0
    numel, compute = math.prod(tensor.shape), torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if not rule.linear:  # all inputs, the sum and a delta
        whole = numel * (tensor.dtype.itemsize * (len(tensor.models) + 1) + 2 * compute.itemsize)
        return whole + (2 * numel * compute.itemsize if rule.filters(tensor.name, tensor.shape) else 0)
    if not rule.filters(tensor.name, tensor.shape):
        return 0
    height, width = tensor.shape
    held = bytes_held((height, width), compute, rule.cutoff, mask=rule.mask, ring_double=rule.ring_double)
    # Chunks are whole groups of rows, which for long rows are more than a chunk of other methods.
    return held + _native.threads() * tensor.dtype.itemsize * (len(tensor.models) + 2) * LANES * width


@fr.fit
def _fit(tensors: Iterable[TensorStream], seed: int) -> Magnitudes | None:
    sums: list[float] | None = None
    count = 0
    for tensor in tensors:
        rule = resolve(tensor.parameters)
        if not (rule.measured and rule.scope == "model" and rule.filters(tensor.name, tensor.shape)):
            continue
        here = _abs_sums(tensor)
        if sums is None:
            sums = [0.0] * len(here)
        sums = [s + h for s, h in zip(sums, here, strict=True)]
        count += tensor.numel
    return None if sums is None else Magnitudes(tuple(s / max(count, 1) for s in sums))


@fr.scan
def _scan(tensor: TensorStream, plan: Magnitudes | None) -> list[float] | None:
    rule = resolve(tensor.parameters)
    if not (rule.measured and rule.scope == "tensor" and rule.takes(tensor.name, tensor.shape)):
        return None
    return [s / tensor.numel for s in _abs_sums(tensor)]


def coefficients(rule: Rule, lambdas: Sequence[float], means: Sequence[float] | None, count: int) -> list[float]:
    """λᵢ of each of `count` models from their mean magnitudes (None where the rule measures none)."""
    if rule.policy == "constant":
        return list(lambdas)
    means = [0.0] * count if means is None else means
    if rule.policy == "align":
        return [v * max(means) / e if e > 0 else 0.0 for v, e in zip(lambdas, means, strict=True)]
    total = math.fsum(means)
    return [v * (e / total if total > 0 else 1.0 / count) for v, e in zip(lambdas, means, strict=True)]


def lambdas_of(given: float | Sequence[float | None] | None, rule: Rule, count: int) -> list[float]:
    each = list(given) if isinstance(given, Sequence) else [given] * count
    return [rule.lambda_ if v is None else v for v in each]


def _given(base: Tensor | None) -> Tensor:
    assert base is not None
    return base


def _filter(delta: Tensor, rule: Rule) -> None:
    ops.highpass_filter(delta, rule.cutoff, mask=rule.mask, ring_double=rule.ring_double, out=delta)


def _abs_sums(tensor: TensorStream) -> list[float]:
    """Σ|delta| of each model, the same for every chunking; blocks that hold a NaN or an Inf are left out."""
    blocks = torch.zeros(tensor.count, -(-tensor.numel // BLOCK), dtype=torch.float64, device="cpu")

    def measure(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        here = ops.abs_sum(base, models)
        blocks[:, offset // BLOCK : offset // BLOCK + here.shape[1]] = here

    tensor.for_each(measure)
    return [math.fsum(v for v in row if math.isfinite(v)) for row in blocks.tolist()]


def _merge_at_once(tensor: TensorStream, rule: Rule, weights: Sequence[float]) -> None:
    """By Triton's kernels without storing the delta, small matrices of a shape in shared launches; else step by step."""

    def merge(offset: int, base: Tensor | None, models: list[Tensor], out: Tensor | None) -> Tensor:
        base, models = _given(base).view(tensor.shape), [m.view(tensor.shape) for m in models]
        out = None if out is None else out.view(tensor.shape)
        merged = fused_merge(
            base,
            models,
            weights,
            rule.cutoff,
            mask=rule.mask,
            ring_double=rule.ring_double,
            dtype=tensor.out_dtype,
            out=out,
        )
        if merged is None:
            delta = ops.weighted_sum(base, models, weights, add_base=False, dtype=tensor.compute)
            delta = ops.highpass_filter(delta, rule.cutoff, mask=rule.mask, ring_double=rule.ring_double)
            merged = ops.weighted_sum(None, [base, delta], 1.0, dtype=tensor.out_dtype, out=out)
        return merged

    tensor.merge_each(merge)


def _in_two_passes(tensor: TensorStream, rule: Rule, weights: Sequence[float]) -> bool:
    """By rows, inputs read twice, holding a thin spectrum; else False, and nothing is done."""
    height, width = tensor.shape
    sample, _ = tensor.read(0, 1)
    passes = two_passes(
        _given(sample), (height, width), tensor.compute, tensor.scratch,
        rule.cutoff, mask=rule.mask, ring_double=rule.ring_double,
    )  # fmt: skip
    if passes is None:
        return False
    # In memory the sums may wait where the result will be.
    held = tensor.place(0, tensor.numel) if tensor.resident and tensor.out_dtype == tensor.compute else None

    def add(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        rows = models[0].numel() // width
        keep = None if held is None else held[offset : offset + rows * width]
        passes.forward(offset // width, rows, base, models, weights, keep)

    def finish(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        count = models[0].numel()
        out = tensor.place(offset, offset + count)
        out = torch.empty(count, dtype=tensor.out_dtype, device="cpu") if out is None else out
        delta = None if held is None else held[offset : offset + count]
        passes.inverse(offset // width, count // width, base, models, weights, out, add_base=True, delta=delta)
        tensor.put(offset, out)

    tensor.for_each(add, align=LANES * width, block=1)
    passes.filter_columns()
    tensor.for_each(finish, align=LANES * width, block=1)
    return True


def _delta(base: Tensor, model: Tensor, out: Tensor) -> Tensor:
    ops.weighted_sum(base, [model], 1.0, add_base=False, out=out)
    return out


def _aligned(tensor: TensorStream, rule: Rule, lambdas: Sequence[float], filtered: bool) -> None:
    """λ·Σ (max E / Eᵢ)·G(δᵢ), E the mean magnitude of this tensor's filtered deltas: the published alignment."""
    base, models = tensor.whole()
    base = _given(base)
    dtype = tensor.compute
    total, delta = tensor.buffer("total", dtype).zero_(), tensor.buffer("delta", dtype)
    largest = 0.0
    for i, (m, v) in enumerate(zip(models, lambdas, strict=True)):
        _delta(base, m, delta)
        if filtered:
            _filter(delta, rule)
        mean = math.fsum(ops.abs_sum(None, [delta])[0].tolist()) / max(tensor.numel, 1)
        largest = max(largest, mean)
        if rule.bugs and not filtered and i > 0:
            continue  # the published sum leaves every key but the filtered ones to the first model
        if mean != 0.0:
            total.add_(delta.mul_(v / mean))
        elif rule.bugs:
            total.fill_(float("nan"))  # 0 · (max / 0)
    tensor.emit(total.mul_(largest), add_base=True)


def _elected(tensor: TensorStream, rule: Rule, lambdas: Sequence[float], filtered: bool) -> None:
    """θ0 + λ·Σ uᵢ·[sign(uᵢ) is that of Σ uⱼ, + where it is 0], uᵢ = weight·G(δᵢ), as the published mergekit fork."""
    base, models = tensor.whole()
    base = _given(base)
    dtype = tensor.compute
    storage = base.dtype if rule.bugs else dtype
    total, delta = tensor.buffer("total", dtype).zero_(), tensor.buffer("delta", dtype)

    def stored(t: Tensor) -> Tensor:
        return t if storage == dtype else t.copy_(t.to(storage))

    def each() -> Iterable[Tensor]:
        for m, v in zip(models, lambdas, strict=True):
            stored(_delta(base, m, delta))
            if filtered:
                _filter(delta, rule)
                stored(delta)
            # The fork has one lambda for all models, applied to the sum; a model's own goes in with its weight.
            yield stored(delta.mul_(rule.weight * (v / scale)))

    scale = lambdas[0] if lambdas[0] != 0 else 1.0
    for u in each():
        total.add_(u)
    positive = stored(total) >= 0
    total.zero_()
    for u in each():  # filtered a second time: cheaper than keeping every delta
        total.add_(u.mul_(torch.where(positive, u > 0, u < 0)))
    stored(stored(total).mul_(scale))
    tensor.emit(total, add_base=True)

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import ops
from ..ops.gram_blocks import BLOCK
from ..ops.threshold import Rule, kept
from ._method import Context, Delta, Deltas, Density, Help, Range, TensorStream, Weight, method
from ._scores import largest


@dataclass(frozen=True)
class Calculated:
    """What SCE finds on a whole tensor: which elements it selects (None: all), and the models' weights."""

    rule: Rule
    weight: list[float]


@method(paper="arXiv:2408.07990", grain="element")
def sce(
    base: Weight,
    deltas: Deltas,
    *,
    select_topk: Annotated[Density, Help("fraction kept of the elements that differ between models")] = 1.0,
    uniform_below: Annotated[
        float, Range(0.0), Help("sum of mean squares below which all models weigh the same; mergekit: 1e-6")
    ] = 0.0,
    context: Context,
) -> Delta:
    """SCE: select the elements whose deltas vary most, weigh each model by its mean square, erase minority signs.

    k = int(select_topk · #{variance ≠ 0}) elements of the largest variance over the models are selected (all of them for
    1); ωᵢ = mean(uᵢ²) / Σ mean(uⱼ²) of the selected deltas; the majority sign is that of Σ uᵢ; and
    Δ = Σ ωᵢ uᵢ [sign agrees] / max(Σ ωᵢ [sign agrees], 1e-6). Real fine-tunes' deltas are so small that mergekit's guard
    makes all weights equal; here they are equal only where every delta vanishes, unless `uniform_below` says otherwise.
    """
    found: Calculated = context.state
    total = deltas[0]
    for d in deltas[1:]:
        total = total + d
    positive = total >= 0
    above = torch.zeros_like(total)
    below = torch.zeros_like(total)
    for d, w in zip(deltas, found.weight, strict=True):
        part = torch.where(positive, d.clamp(min=0), d.clamp(max=0))
        above = above + part * w
        below = below + (part != 0) * w
    merged = above / below.clamp(min=1e-6)
    if found.rule is None:
        return merged
    return merged.masked_fill(~kept(variance(deltas), found.rule, context.offset), 0.0)


@sce.scan
def _(tensor: TensorStream, plan: Any) -> Calculated:
    fraction = tensor.parameters["select_topk"]
    rule: Rule = None
    if fraction < 1.0:
        rule = largest(tensor, _variance, [int(fraction * _count(tensor))])[0]
    sums = torch.zeros((-(-tensor.numel // BLOCK), tensor.count), dtype=torch.float64)

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        deltas = _deltas(base, models)
        chosen = None if rule is None else kept(variance(deltas), rule, offset)
        for i, d in enumerate(deltas):
            part = ops.gram_blocks(None, [d if chosen is None else d * chosen])
            sums[offset // BLOCK : offset // BLOCK + len(part), i] = part[:, 0]

    tensor.for_each(visit)
    energy = [float(s) / max(tensor.numel, 1) for s in sums.cumsum(0)[-1]] if len(sums) else [0.0] * tensor.count
    total = sum(energy)
    if total == 0.0 or total < tensor.parameters["uniform_below"]:
        return Calculated(rule, [1.0 / tensor.count] * tensor.count)
    return Calculated(rule, [e / total for e in energy])


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance over the models, exactly 0 where they are all equal: deviations are taken from the first."""
    shifted = [d - deltas[0] for d in deltas[1:]]
    mean = torch.zeros_like(deltas[0])
    for s in shifted:
        mean = mean + s
    mean = mean / len(deltas)
    squares = mean.square()  # the first one's own deviation
    for s in shifted:
        squares = squares + (s - mean).square_()
    return squares / len(deltas)


def _deltas(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
    assert base is not None
    wide = torch.float64 if any(t.dtype == torch.float64 for t in (base, *models)) else torch.float32
    origin = base.reshape(-1).to(wide)
    return [m.reshape(-1).to(wide) - origin for m in models]


def _variance(offset: int, base: Tensor | None, models: list[Tensor]) -> Tensor:
    return variance(_deltas(base, models))


def _count(tensor: TensorStream) -> int:
    """Elements whose variance is not 0."""
    counts: list[int] = []
    lock = threading.Lock()

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        here = int(_variance(offset, base, models).count_nonzero())
        with lock:
            counts.append(here)

    tensor.for_each(visit)
    return sum(counts)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .. import ops
from ..ops.gram_blocks import BLOCK
from ..ops.threshold import Threshold, Window
from ._method import Context, Density, Help, Models, Range, TensorStream, Weight, method
from ._scores import largest_share


@dataclass(frozen=True)
class Calculated:
    """What SCE finds on a whole tensor: which elements it selects (None: all), and the models' weights.

    There are no weights (None) where a selected delta is NaN or Inf: mean squares are not numbers then.
    """

    rule: Threshold | None
    weight: list[float] | None


@method(paper="arXiv:2408.07990", grain="element", reads=3)
def sce(
    base: Weight,
    models: Models,
    *,
    select_topk: Annotated[Density, Help("fraction kept of the elements that differ between models")] = 1.0,
    uniform_below: Annotated[
        float, Range(0.0), Help("sum of mean squares below which all models weigh the same; mergekit: 1e-6")
    ] = 0.0,
    context: Context,
) -> Weight:
    """SCE: select the elements whose deltas vary most, weigh each model by its mean square, erase minority signs.

    k = int(select_topk · #{variance ≠ 0}) elements of the largest variance over the models are selected (all of them for
    1); ωᵢ = mean(uᵢ²) / Σ mean(uⱼ²) of the selected deltas; the majority sign is that of Σ uᵢ; and
    Δ = Σ ωᵢ uᵢ [sign agrees] / max(Σ ωᵢ [sign agrees], 1e-6). Real fine-tunes' deltas are so small that mergekit's guard
    makes all weights equal; here they are equal only where every delta vanishes, unless `uniform_below` says otherwise.
    A selected NaN or Inf makes the whole tensor NaN, as every element depends on the mean squares.
    """
    found: Calculated = context.state
    if found.weight is None:
        out = torch.empty_like(base, dtype=context.dtype) if context.out is None else context.out
        return out.fill_(float("nan"))
    out = ops.sce_merge(
        base, models, found.weight, found.rule, offset=context.offset, dtype=context.dtype, out=context.out
    )
    return out


@sce.scan
def _(tensor: TensorStream, plan: Any) -> Calculated:
    fraction = tensor.parameters["select_topk"]
    rule: Threshold | None = None
    if fraction < 1.0:
        found = largest_share(tensor, _variance, fraction)
        assert not isinstance(found, Window)
        rule = found
    sums = torch.zeros((-(-tensor.numel // BLOCK), tensor.count), dtype=torch.float64, device="cpu")

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        assert base is not None
        part = ops.sce_energy(base.reshape(-1), [m.reshape(-1) for m in models], rule, offset=offset)
        sums[offset // BLOCK : offset // BLOCK + len(part)] = part

    tensor.for_each(visit)
    energy = [float(s) / max(tensor.numel, 1) for s in sums.cumsum(0)[-1]] if len(sums) else [0.0] * tensor.count
    total = sum(energy)
    if not math.isfinite(total):
        return Calculated(rule, None)
    if total == 0.0 or total < tensor.parameters["uniform_below"]:
        return Calculated(rule, [1.0 / tensor.count] * tensor.count)
    return Calculated(rule, [e / total for e in energy])


def _variance(offset: int, base: Tensor | None, models: list[Tensor]) -> Tensor:
    assert base is not None
    scores: Tensor = ops.sce_variance(base, models)
    return scores

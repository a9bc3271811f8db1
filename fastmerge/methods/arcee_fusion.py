from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ._method import Context, Models, TensorStream, Weight, method
from ._scores import order_statistics


@dataclass(frozen=True)
class Importance:
    """One tensor's divergence per row [rows], and the importance from which a delta is kept."""

    divergence: Tensor
    threshold: float


@method(models=(1, 1), grain="element", reads=3)
def arcee_fusion(base: Weight, models: Models, *, context: Context) -> Weight:
    """Arcee Fusion: take from the other model the elements that matter most, leave the base elsewhere.

    Importance is |δ| times the row's KL(softmax(θ₁) ‖ softmax(θ₀)) over the last axis, 1e-8 added to both; a delta is
    kept where it is at least median + 1.5 (q₃ − q₁), quantiles being the elements int(q (n − 1)) of the ascending order.
    mergekit takes the quantiles of a random million of larger tensors; here they are exact, so results repeat.
    """
    found: Importance = context.state
    row = context.shape[-1] if context.shape else 1
    out: Tensor = ops.arcee_merge(
        base, models[0], found.divergence, found.threshold,
        row=row, offset=context.offset, dtype=context.dtype, out=context.out,
    )  # fmt: skip
    return out


@arcee_fusion.scan
def _(tensor: TensorStream, plan: Any) -> Importance:
    if tensor.numel == 0:
        return Importance(torch.zeros(1, dtype=tensor.compute, device="cpu"), 0.0)
    row = tensor.shape[-1] if tensor.shape else 1
    divergence = torch.empty(tensor.numel // row, dtype=tensor.compute, device="cpu")

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        assert base is not None
        rows = ops.arcee_divergence(base.reshape(-1, row), models[0].reshape(-1, row))
        divergence[offset // row : offset // row + len(rows)] = rows

    tensor.for_each(visit, align=row, block=1)

    def score(offset: int, base: Tensor | None, models: list[Tensor]) -> Tensor:
        assert base is not None
        scores: Tensor = ops.arcee_importance(
            base.reshape(-1), models[0].reshape(-1), divergence, row=row, offset=offset
        )
        return scores

    places = [int(q * (tensor.numel - 1)) for q in (0.25, 0.5, 0.75)]
    first, median, third = order_statistics(tensor, score, places)
    return Importance(divergence, median + 1.5 * (third - first))

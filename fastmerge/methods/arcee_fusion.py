from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._gram import row_sums
from ._method import Context, Models, TensorStream, Weight, method
from ._scores import order_statistics


@dataclass(frozen=True)
class Importance:
    """One tensor's divergence per row [rows], and the importance from which a delta is kept."""

    divergence: Tensor
    threshold: float


@method(models=(1, 1), grain="element")
def arcee_fusion(base: Weight, models: Models, *, context: Context) -> Weight:
    """Arcee Fusion: take from the other model the elements that matter most, leave the base elsewhere.

    Importance is |δ| times the row's KL(softmax(θ₁) ‖ softmax(θ₀)) over the last axis, 1e-8 added to both; a delta is
    kept where it is at least median + 1.5 (q₃ − q₁), quantiles being the elements int(q (n − 1)) of the ascending order.
    mergekit takes the quantiles of a random million of larger tensors; here they are exact, so results repeat.
    """
    found: Importance = context.state
    wide = torch.float64 if torch.float64 in (base.dtype, models[0].dtype) else torch.float32
    delta = models[0].to(wide) - base.to(wide)
    kept = _importance(delta, found.divergence, context.offset, _row(context.shape)) >= found.threshold
    return base.to(wide) + torch.where(kept, delta, 0.0)


@arcee_fusion.scan
def _(tensor: TensorStream, plan: Any) -> Importance:
    if tensor.numel == 0:
        return Importance(torch.zeros(1), 0.0)
    row = _row(tensor.shape)
    divergence: list[Tensor] = [torch.empty(0)] * (tensor.numel // row)

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        assert base is not None
        # In float64: the terms of a fine-tune's divergence are a thousand times their sum, which float32 would blur.
        rows = _divergence(base.reshape(-1, row).double(), models[0].reshape(-1, row).double()).to(tensor.compute)
        divergence[offset // row : offset // row + len(rows)] = rows.unbind()

    tensor.for_each(visit, align=row)
    rows = torch.stack(divergence)

    def score(offset: int, base: Tensor | None, models: list[Tensor]) -> Tensor:
        assert base is not None
        delta = models[0].reshape(-1).to(tensor.compute) - base.reshape(-1).to(tensor.compute)
        return _importance(delta, rows, offset, row)

    places = [int(q * (tensor.numel - 1)) for q in (0.25, 0.5, 0.75)]
    first, median, third = order_statistics(tensor, score, places)
    return Importance(rows, median + 1.5 * (third - first))


def _row(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) else 1


def _divergence(base: Tensor, other: Tensor) -> Tensor:
    p, q = other.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    return row_sums(p * (p / q).log())


def _importance(delta: Tensor, divergence: Tensor, offset: int, row: int) -> Tensor:
    """|δ| times its row's divergence, for flat elements from `offset` on."""
    flat = delta.reshape(-1)
    first, last = offset // row, -(-(offset + flat.numel()) // row)
    spread = divergence[first:last].to(flat.device).repeat_interleave(row)[offset - first * row :][: flat.numel()]
    return (flat.abs() * spread).view(delta.shape)

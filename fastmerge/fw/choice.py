"""What one pass over the candidates leaves, and the vertices it makes the best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.fw_lmo import choose as choose_from
from ..ops.fw_lmo import lowest as lowest_of
from ..ops.fw_products import FwProducts


@dataclass(frozen=True)
class Part:
    """The elements [begin, end) of a flattened tensor that this process holds; `base` is where the base has them."""

    shape: tuple[int, ...]
    begin: int
    end: int
    base: int

    @property
    def numel(self) -> int:
        return self.end - self.begin


@dataclass
class Products:
    """Sums over each tensor, float64: what one pass over the candidates leaves.

    A pass with `relative` measures from θ: s stands for s − θ, and ⟨g, θ⟩ is 0.
    """

    names: list[str]
    dots: Tensor  # [K, L] ⟨g, s⟩
    squares: Tensor  # [K, L] ‖s‖²; NaN when not asked for
    point: Tensor  # [L] ⟨g, θ⟩
    gradient: Tensor  # [L] ‖g‖²


@dataclass(frozen=True)
class Choice:
    """What the oracle picked. Layer: one entry per tensor; model: one for all."""

    chosen: list[int]  # candidate, or -1 for the zero vertex
    scores: list[float]  # of the pick
    margins: list[float]  # how much worse the runner-up is (inf when there is none)
    gap: float  # max over the hull of ⟨g, θ − s⟩
    table: Tensor  # [K, L] or [K, 1] scores


def slopes(p: Products, granularity: str) -> Tensor:
    """[K, L] or [K, 1] ⟨g, s − θ⟩ / ‖s − θ‖ of relative products, 0 where s = θ: the loss's change per distance.

    Of all points θ + γ(s − θ), the smoothness bound ℓ + γ⟨g, s − θ⟩ + γ²L/2·‖s − θ‖² promises the largest decrease,
    ⟨g, s − θ⟩² / (2L‖s − θ‖²), on the way to the vertex with the lowest slope (while γ <= 1), whatever L is. ⟨g, s⟩
    alone prefers what is far away: networks that have nothing to do with the others.
    """
    dots, squares = (p.dots, p.squares) if granularity == "layer" else (total_row(p.dots), total_row(p.squares))
    return torch.where(squares > 0, dots / squares.sqrt(), 0.0)


def total_row(x: Tensor) -> Tensor:
    """[K, 1] sums of the rows of [K, L], in index order."""
    out = torch.zeros_like(x[:, :1])
    for i in range(x.shape[1]):
        out = out + x[:, i : i + 1]
    return out


def choose(p: Products, *, metric: str, granularity: str, zero_if_ascent: bool) -> Choice:
    """The best vertex by score (the first of equals), and the duality gap, which always uses the inner product."""
    sums = [FwProducts(p.dots[:, i], p.squares[:, i], p.gradient[i]) for i in range(len(p.names))]
    if metric == "slope":
        table = slopes(p, granularity)
        chosen = lowest_of(table)
    else:
        picked = choose_from(sums, metric=metric, granularity=granularity, zero_if_ascent=zero_if_ascent)
        table, chosen = picked.score, picked.choice
    best = table.min(0).values
    margins = [float("inf")] * table.shape[1]
    if table.shape[0] > 1:
        two = table.sort(0).values[:2]
        margins = (two[1] - two[0]).tolist()
    inner = table if metric == "dot" else choose_from(sums, metric="dot", granularity=granularity).score
    lowest = inner.min(0).values
    if zero_if_ascent:
        lowest = lowest.clamp(max=0)  # the zero vertex is part of the hull
    return Choice(chosen.tolist(), best.tolist(), margins, float(p.point.sum() - lowest.sum()), table)

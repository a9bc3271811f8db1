from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ._method import Context, Delta, Deltas, Help, Range, TensorStream, Weight, method

Epsilon = Annotated[float, Range(0.0), Help("an element of a delta counts where its magnitude is above this")]


@method(grain="element")
def ram(base: Weight, deltas: Deltas, *, epsilon: Epsilon = 1e-5) -> Delta:
    """RAM: where one model alone changed an element its delta is kept whole, where several did their mean is taken."""
    return _merge(deltas, [1.0] * len(deltas), epsilon)


@method(grain="element")
def ramplus_tl(
    base: Weight,
    deltas: Deltas,
    *,
    r: Annotated[float, Help("strength of the amplification")] = 0.1,
    alpha: Annotated[float, Range(0.0), Help("largest overlap ratio that counts")] = 0.2,
    epsilon: Epsilon = 1e-5,
    context: Context,
) -> Delta:
    """RAM+ by tensor: as ram, and what one model alone changed is amplified by 1 + r · clamp(ρᵢ, 0, alpha).

    ρᵢ = #shared / max(#unique, epsilon): of the elements that model i changed in this tensor, those that others changed
    too, over those that it alone changed.
    """
    return _merge(deltas, context.state, epsilon)


@ramplus_tl.scan
def _(tensor: TensorStream, plan: Any) -> list[float]:
    p = tensor.parameters
    unique, shared = [0] * tensor.count, [0] * tensor.count
    lock = threading.Lock()

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        assert base is not None
        origin = base.to(tensor.compute)
        changed = [(m.to(tensor.compute) - origin).abs() > p["epsilon"] for m in models]
        alone = _count(changed) == 1
        mine = [(int((c & alone).sum()), int(c.sum())) for c in changed]
        with lock:
            for i, (own, every) in enumerate(mine):
                unique[i] += own
                shared[i] += every - own

    tensor.for_each(visit)
    ratios = [s / (max(u, p["epsilon"]) or 1.0) for u, s in zip(unique, shared, strict=True)]
    return [1.0 + p["r"] * min(max(ratio, 0.0), p["alpha"]) for ratio in ratios]


def _count(changed: Sequence[Tensor]) -> Tensor:
    total = changed[0].to(torch.int16)
    for c in changed[1:]:
        total = total + c
    return total


def _merge(deltas: Sequence[Tensor], factors: Sequence[float], epsilon: float) -> Tensor:
    changed = [d.abs() > epsilon for d in deltas]
    count = _count(changed)
    alone = count == 1
    merged = torch.zeros_like(deltas[0])
    for d, c, factor in zip(deltas, changed, factors, strict=True):
        merged = merged + torch.where(c, torch.where(alone, d * factor, d), 0.0)
    return merged / count.clamp(min=1)

from __future__ import annotations

import threading
from typing import Annotated, Any

from torch import Tensor

from .. import ops
from ._method import Context, Help, Models, Range, TensorStream, Weight, method

Epsilon = Annotated[float, Range(0.0), Help("an element of a delta counts where its magnitude is above this")]


@method(grain="element")
def ram(base: Weight, models: Models, *, epsilon: Epsilon = 1e-5, context: Context) -> Weight:
    """RAM: where one model alone changed an element its delta is kept whole, where several did their mean is taken."""
    out: Tensor = ops.ram_merge(base, models, 1.0, epsilon, dtype=context.dtype, out=context.out)
    return out


@method(grain="element")
def ramplus_tl(
    base: Weight,
    models: Models,
    *,
    r: Annotated[float, Help("strength of the amplification")] = 0.1,
    alpha: Annotated[float, Range(0.0), Help("largest overlap ratio that counts")] = 0.2,
    epsilon: Epsilon = 1e-5,
    context: Context,
) -> Weight:
    """RAM+ by tensor: as ram, and what one model alone changed is amplified by 1 + r · clamp(ρᵢ, 0, alpha).

    ρᵢ = #shared / max(#unique, epsilon): of the elements that model i changed in this tensor, those that others changed
    too, over those that it alone changed.
    """
    out: Tensor = ops.ram_merge(base, models, context.state, epsilon, dtype=context.dtype, out=context.out)
    return out


@ramplus_tl.scan
def _(tensor: TensorStream, plan: Any) -> list[float]:
    p = tensor.parameters
    counts = [[0, 0] for _ in range(tensor.count)]
    lock = threading.Lock()

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        here = ops.ram_counts(base, models, p["epsilon"]).tolist()
        with lock:
            for total, (unique, shared) in zip(counts, here, strict=True):
                total[0] += unique
                total[1] += shared

    tensor.for_each(visit)
    ratios = [shared / (max(unique, p["epsilon"]) or 1.0) for unique, shared in counts]
    return [1.0 + p["r"] * min(max(ratio, 0.0), p["alpha"]) for ratio in ratios]

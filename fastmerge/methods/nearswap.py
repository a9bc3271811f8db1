from __future__ import annotations

from torch import Tensor

from .. import ops
from ._method import Context, Models, Weight, method


@method(models=(1, 1), grain="element")
def nearswap(base: Weight, models: Models, *, t: float, context: Context) -> Weight:
    """Move towards the other model most where the two are near: s = clamp(t / max(|θ₀ − θ₁|, 1e-6), 0, 1)."""
    out: Tensor = ops.nearswap(base, models[0], t, dtype=context.dtype, out=context.out)
    return out

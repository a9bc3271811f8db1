from __future__ import annotations

from torch import Tensor

from .. import ops
from ._method import Context, Models, Weight, method


@method(base="ignored", models=(1, 1), grain="element")
def passthrough(base: Weight | None, models: Models, *, scale: float | None = None, context: Context) -> Weight:
    """One model as it is, optionally times `scale`; with slices, a new stack of layers."""
    if scale is None:
        return models[0]
    out: Tensor = ops.weighted_sum(None, models, scale, dtype=context.dtype, out=context.out)
    return out

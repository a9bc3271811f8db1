from __future__ import annotations

from torch import Tensor

from .. import ops
from ._method import Context, Models, PerModel, Weight, method


@method(paper="arXiv:2212.04089", grain="element", one_call=True)
def task_arithmetic(
    base: Weight,
    models: Models,
    *,
    weight: PerModel[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    context: Context,
) -> Weight:
    """The base plus a weighted sum of deltas: θ₀ + λ Σ wᵢ (θᵢ − θ₀), the sum divided by Σ wᵢ when `normalize`."""
    out: Tensor = ops.weighted_sum(
        base, models, weight, normalize=normalize, scale=lambda_, dtype=context.dtype, out=context.out
    )
    return out

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import ops
from ._method import Context, Header, Models, PerModel, Weight, method
from ._weights import check_sums


@method(paper="arXiv:2203.05482", base="ignored", grain="element", one_call=True)
def linear(
    base: Weight | None, models: Models, *, weight: PerModel[float], normalize: bool = True, context: Context
) -> Weight:
    """Weighted average of the models: Σ wᵢ θᵢ, divided by Σ wᵢ when `normalize`."""
    out: Tensor = ops.weighted_sum(None, models, weight, normalize=normalize, dtype=context.dtype, out=context.out)
    return out


@linear.check
def _(tensors: Sequence[Header]) -> None:
    check_sums(tensors, "normalize")

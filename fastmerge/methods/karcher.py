from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from .. import ops
from ._gram import karcher_coefficients, stream_gram
from ._method import Context, Models, Range, TensorStream, Weight, method


@method(paper="doi:10.1002/cpa.3160300502", base="ignored", models=(2, None), grain="element")
def karcher(
    base: Weight | None,
    models: Models,
    *,
    max_iter: Annotated[int, Range(1, 10_000)] = 10,
    tol: Annotated[float, Range(0.0)] = 1e-5,
    context: Context,
) -> Weight:
    """The Riemannian (Karcher) mean of the models' directions, at their mean length, over whole tensors."""
    out: Tensor = ops.weighted_sum(None, models, context.state, dtype=context.dtype, out=context.out)
    return out


@karcher.scan
def _(tensor: TensorStream, plan: Any) -> Any:
    parameters = tensor.parameters
    return karcher_coefficients(stream_gram(tensor, deltas=False), parameters["max_iter"], parameters["tol"])

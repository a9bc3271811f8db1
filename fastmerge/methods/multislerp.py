from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor

from .. import ops
from ..errors import BadInput
from ._gram import multislerp_coefficients, stream_gram
from ._method import Context, Header, Models, PerModel, Range, TensorStream, Weight, method
from ._weights import check_sums


@method(base="optional", models=(2, None), grain="element")
def multislerp(
    base: Weight | None,
    models: Models,
    *,
    weight: PerModel[float],
    normalize_weights: bool = True,
    eps: Annotated[float, Range(0.0)] = 1e-8,
    context: Context,
) -> Weight:
    """Barycentric interpolation on the sphere of any number of models (of their deltas when a base is given)."""
    out: Tensor = ops.weighted_sum(base, models, context.state, dtype=context.dtype, out=context.out)
    return out


@multislerp.check
def _(tensors: Sequence[Header]) -> None:
    check_sums(tensors, "normalize_weights")


@multislerp.scan
def _(tensor: TensorStream, plan: Any) -> Any:
    weight = list(tensor.parameters["weight"])
    if tensor.parameters["normalize_weights"]:
        total = sum(weight)
        weight = [w / total for w in weight]
    try:
        return multislerp_coefficients(stream_gram(tensor, deltas=tensor.has_base), weight, tensor.parameters["eps"])
    except ZeroDivisionError as error:
        raise BadInput(
            f"multislerp of tensor {tensor.name!r}: {error}", remedy="change the weights, or merge fewer models at once"
        ) from error

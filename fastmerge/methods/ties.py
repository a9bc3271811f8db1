from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor

from .. import ops
from ._method import Context, Density, Header, Models, PerModel, TensorStream, Weight, method
from ._thresholds import check_scope, found_by_kernels, model_thresholds, of_tensor, tensor_thresholds


@method(paper="arXiv:2306.01708", grain="element", one_call=True)
def ties(
    base: Weight,
    models: Models,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = 1.0,
    normalize: bool = True,
    lambda_: float = 1.0,
    scope: Literal["tensor", "model"] = "tensor",
    elect: Literal["sum", "count"] = "sum",
    context: Context,
) -> Weight:
    """TIES: keep the largest deltas, elect a sign per element, average the deltas that agree, add to the base.

    `density` is the fraction kept, by magnitude over each tensor, or over the whole model with ``scope: model`` (the
    paper's way). The sign is elected by the sum of weighted deltas, or by their count. See ``ops.consensus_merge``.
    """
    out: Tensor = ops.consensus_merge(
        base,
        models,
        weight,
        density,
        trim="topk",
        elect=elect,
        normalize=normalize,
        scale=lambda_,
        thresholds=context.state,
        offset=context.offset,
        dtype=context.dtype,
        out=context.out,
    )
    return out


@ties.check
def _(tensors: Sequence[Header]) -> None:
    check_scope(tensors)


@ties.fit
def _(tensors: Iterable[TensorStream], seed: int) -> Any:
    return model_thresholds(tensors)


@ties.scan
def _(tensor: TensorStream, plan: Any) -> Any:
    if plan is not None:
        return of_tensor(plan, tensor)
    if found_by_kernels(tensor):
        return None
    return tensor_thresholds(tensor, tensor.parameters["density"])

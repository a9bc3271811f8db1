from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops.gram_blocks import pairs
from ._gram import model_stock_ratio, stream_gram
from ._lines import longest, merge_rows
from ._method import Context, Header, TensorStream, method


@method(paper="arXiv:2403.19522", models=(2, None), grain="stream", reads=2)
def model_stock(tensor: TensorStream, *, filter_wise: bool = False, context: Context) -> None:
    """Interpolate between the base and the models' average by the angle between their deltas.

    t = K c / (1 + (K − 1) c), c the mean cosine of the deltas; over whole tensors, or per row with `filter_wise`.
    """
    share = [1.0 / tensor.count] * tensor.count
    if not filter_wise or len(tensor.shape) < 2:
        ratio = model_stock_ratio(stream_gram(tensor, deltas=True))
        tensor.merge_each(
            lambda offset, base, models, out: ops.weighted_sum(
                base, models, share, scale=ratio, dtype=context.dtype, out=out
            )
        )
        return
    merge_rows(tensor, lambda products: _filters(products, tensor.count), context.dtype)


@model_stock.memory
def _memory(tensors: Sequence[Header]) -> int:
    """By filter: rows that are longer than a chunk."""
    return longest((t, t.shape[-1]) for t in tensors if t.parameters["filter_wise"] and len(t.shape) >= 2)


def _filters(products: Tensor, count: int) -> Tensor:
    """The weights [K, rows], all the same within a row, from the products of each."""
    place = {pair: p for p, pair in enumerate(pairs(count))}
    length = [products[:, place[i, i]].sqrt() for i in range(count)]
    cosine = torch.zeros_like(length[0])
    for i in range(count):
        for j in range(i + 1, count):
            cosine = cosine + (products[:, place[i, j]] / (length[i] * length[j]).clamp(min=1e-6)).clamp(-1, 1)
    cosine = cosine / (count * (count - 1) / 2)
    divisor = 1 + (count - 1) * cosine
    ratio = torch.where(divisor.abs() <= 1e-6, 0.0, count * cosine / divisor)
    return (ratio / count).expand(count, -1)

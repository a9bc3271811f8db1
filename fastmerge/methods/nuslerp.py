from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ._gram import nuslerp_coefficients, stream_gram
from ._lines import longest, merge_columns, merge_rows
from ._method import Context, Header, PerModel, TensorStream, method


@method(base="optional", models=(2, 2), grain="stream", reads=2)
def nuslerp(
    tensor: TensorStream,
    *,
    weight: PerModel[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    context: Context,
) -> None:
    """Spherical interpolation between two models (their deltas when a base is given), over tensors, rows or columns.

    The share of the second is w₂ / (w₁ + w₂). ``nuslerp_flatten: false`` interpolates along the last axis, with
    ``nuslerp_row_wise: true`` along the first.
    """
    first, second = tensor.parameters["weight"]
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    if nuslerp_flatten or len(tensor.shape) < 2:
        coefficients = nuslerp_coefficients(stream_gram(tensor, deltas=tensor.has_base), t)
        tensor.merge_each(
            lambda offset, base, models, out: ops.weighted_sum(base, models, coefficients, dtype=context.dtype, out=out)
        )
        return
    merge = merge_columns if nuslerp_row_wise else merge_rows
    merge(tensor, lambda products: _along(products, t), context.dtype)


def _along(products: Tensor, t: float) -> Tensor:
    """The weights [2, lines] from the products (aa, ab, bb) of each line."""
    aa, ab, bb = products.unbind(1)
    length = aa.sqrt() * bb.sqrt()
    cos = torch.where(length == 0, 1.0, ab / length).clamp(-1, 1)  # NaN stays
    phi = cos.acos()
    colinear = 1 - cos * cos <= 1e-16
    sin = torch.where(colinear, 1.0, phi.sin())
    first = torch.where(colinear, 1 - t, ((1 - t) * phi).sin() / sin)
    second = torch.where(colinear, t, (t * phi).sin() / sin)
    return torch.stack([first, second])


@nuslerp.memory
def _memory(tensors: Sequence[Header]) -> int:
    """Lines that are longer than a chunk; along the first axis three products and two shares for each column, too."""
    lines = [t for t in tensors if not t.parameters["nuslerp_flatten"] and len(t.shape) >= 2]
    rows = [(t, t.shape[-1]) for t in lines if not t.parameters["nuslerp_row_wise"]]
    columns = [(t, math.prod(t.shape[1:])) for t in lines if t.parameters["nuslerp_row_wise"]]
    return longest([*rows, *columns]) + 200 * max((n for _, n in columns), default=0)

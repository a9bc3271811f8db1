from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ._gram import nuslerp_coefficients, row_sums, stream_gram
from ._method import Context, Header, PerModel, TensorStream, method


@method(base="optional", models=(2, 2), grain="stream")
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
    base, models = tensor.whole()
    wide = torch.float64 if any(m.dtype == torch.float64 for m in models) else torch.float32
    a, b = (m.to(wide) if base is None else m.to(wide) - base.to(wide) for m in models)
    tensor.emit(_along(a, b, t, 0 if nuslerp_row_wise else -1), add_base=base is not None)


def _along(a: Tensor, b: Tensor, t: float, axis: int) -> Tensor:
    aa, bb, ab = (row_sums((x * y).movedim(axis, -1)).unsqueeze(axis) for x, y in ((a, a), (b, b), (a, b)))
    length = aa.sqrt() * bb.sqrt()
    cos = torch.where(length > 0, ab / length, 1.0).clamp(-1, 1)
    phi = cos.acos()
    colinear = 1 - cos * cos <= 1e-16
    sin = torch.where(colinear, 1.0, phi.sin())
    first = torch.where(colinear, 1 - t, ((1 - t) * phi).sin() / sin)
    second = torch.where(colinear, t, (t * phi).sin() / sin)
    return first * a + second * b


@nuslerp.memory
def _memory(tensors: Sequence[Header]) -> int:
    """Along rows or columns: whole tensors in float32, both models, two shares and the result."""
    axes = (t for t in tensors if not t.parameters["nuslerp_flatten"] and len(t.shape) >= 2)
    return 20 * max((math.prod(t.shape) for t in axes), default=0)

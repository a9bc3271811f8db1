from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ._gram import slerp_coefficients, stream_gram
from ._method import Context, Models, TensorStream, Weight, method


@method(paper="doi:10.1145/325165.325242", models=(1, 1), grain="element")
def slerp(base: Weight, models: Models, *, t: float, context: Context) -> Weight:
    """Spherical interpolation from the base (t = 0) to one other model (t = 1), over whole tensors.

    Linear where the tensors are nearly colinear (|cos| > 0.9995).
    """
    out: Tensor = ops.weighted_sum(None, [base, models[0]], context.state, dtype=context.dtype, out=context.out)
    return out


@slerp.scan
def _(tensor: TensorStream, plan: Any) -> Any:
    return slerp_coefficients(stream_gram(tensor, deltas=False, base_first=True), tensor.parameters["t"])

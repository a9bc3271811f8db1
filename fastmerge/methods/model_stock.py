from __future__ import annotations

import torch

from .. import ops
from ._gram import model_stock_ratio, row_sums, stream_gram
from ._method import Context, TensorStream, method


@method(paper="arXiv:2403.19522", models=(2, None), grain="stream")
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
    base, models = tensor.whole()
    assert base is not None
    wide = torch.float64 if any(m.dtype == torch.float64 for m in models) else torch.float32
    deltas = [m.to(wide) - base.to(wide) for m in models]
    cosine = torch.zeros(())
    for i, a in enumerate(deltas):
        for b in deltas[i + 1 :]:
            length = (row_sums(a * a).sqrt() * row_sums(b * b).sqrt()).clamp(min=1e-6)
            cosine = cosine + (row_sums(a * b) / length).clamp(-1, 1)[..., None]
    count = len(deltas)
    cosine = cosine / (count * (count - 1) / 2)
    divisor = 1 + (count - 1) * cosine
    ratio_of_row = torch.where(divisor.abs() <= 1e-6, 0.0, count * cosine / divisor)
    average = deltas[0]
    for d in deltas[1:]:
        average = average + d
    tensor.emit(ratio_of_row * (average / count), add_base=True)

"""topk_mask: which elements are among the k largest magnitudes, exactly; ties go to the lowest index.

Story: a row that fits in a program's registers is read once: its k-th key is found by bisection on the key's bits, one
count over the row a bit, and the mask is written at once. Longer rows and whole tensors go through _select.py, which
makes the mask in the one read that it needs, and sets what was undecided then. Neither waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._jit import jit, launch, tl, tl_dtype, triton, warps, wide_dtype
from ._select import Segment, select
from ._select_kernels import bisect, magnitude_key

ROW = 16384  # longest row that a program holds
_BATCH = 4096  # longer rows selected at a time


@jit(do_not_specialize=["k"])
def topk_row_kernel(x_ptr, out_ptr, length, k, COMPUTE: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * length
    offsets = tl.arange(0, BLOCK)
    ok = offsets < length
    key = magnitude_key(tl.load(x_ptr + row + offsets, mask=ok, other=0.0).to(COMPUTE))
    key = tl.where(ok, key, -1)
    v, hit, above = bisect(key, tl.full((), HIGH + 1, tl.int32), LOW, k, k)
    if hit != 0:
        keep = key >= v
    else:  # ties
        equal = key == v
        keep = (key > v) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= k - above))
    tl.store(out_ptr + row + offsets, keep.to(tl.uint8), mask=ok)


def topk_mask(x: Tensor, k: int, out: Tensor, *, block: int | None = None) -> Tensor:
    """Fills `out` (bool, contiguous [R, L]) with the k largest magnitudes of each row of x [R, L], 0 <= k <= L."""
    rows, length = x.shape
    if k == 0 or k == length or not x.numel():
        return out.fill_(k > 0)
    x, compute, mask = x.contiguous(), wide_dtype(x), out.view(torch.uint8)
    if length <= ROW:
        high, low = (
            (62, 0) if compute == torch.float64 else (30, {torch.bfloat16: 16, torch.float16: 13}.get(x.dtype, 0))
        )
        padded = triton.next_power_of_2(length)
        launch(
            topk_row_kernel, (rows,), x, mask, length, k, COMPUTE=tl_dtype(compute), HIGH=high, LOW=low, BLOCK=padded,
            num_warps=warps(min(32, max(1, padded // 512))), device=x.device,
        )  # fmt: skip
        return out
    rules = torch.empty(rows, 2, dtype=torch.int64, device=x.device)
    for begin in range(0, rows, _BATCH):
        batch = range(begin, min(rows, begin + _BATCH))
        select([Segment(None, x[r], k, mask[r]) for r in batch], rules, list(batch), block=block)
    return out

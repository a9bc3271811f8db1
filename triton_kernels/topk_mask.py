"""topk_mask: which elements are among the k largest magnitudes, exactly; ties go to the lowest index.

Story: a row that fits in a program's registers is read once: its k-th key is found by bisection on the key's bits, one
count over the row a bit, and the mask is written at once. Longer rows and whole tensors go through _select.py: two reads
for the threshold (one after a sample, from 2^24 elements on), and another for the mask. Neither waits for the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._jit import INTERPRETING, block_size, jit, launch, read, tl, tl_dtype, triton, warps, wide_dtype
from ._select import Segment, select
from ._select_kernels import magnitude_key

ROW = 16384  # longest row that a program holds
_BATCH = 256  # longer rows selected at a time: 4096 counters each


@jit(do_not_specialize=["k"])
def topk_row_kernel(x_ptr, out_ptr, length, k, COMPUTE: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * length
    offsets = tl.arange(0, BLOCK)
    ok = offsets < length
    key = magnitude_key(tl.load(x_ptr + row + offsets, mask=ok, other=0.0).to(COMPUTE))
    key = tl.where(ok, key, -1)
    # The largest key that at least k elements reach, bit by bit from above.
    threshold = tl.zeros((1,), key.dtype)
    one = tl.full((1,), 1, key.dtype)
    for i in tl.range(0, HIGH - LOW + 1):
        trial = threshold | (one << (HIGH - i))
        reached = tl.sum((key >= trial).to(tl.int32), 0)
        threshold = tl.where(reached >= k, trial, threshold)
    equal = key == threshold
    wanted = k - tl.sum((key > threshold).to(tl.int32), 0)
    keep = (key > threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted))
    tl.store(out_ptr + row + offsets, keep.to(tl.uint8), mask=ok)


@jit
def rule_mask_kernel(
    x_ptr, rule_ptr, out_ptr, length, SINGLE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):
    """The mask of rows [gridDim.y, length], each by its rule; of a single row the compiler knows the alignment."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    threshold = tl.load(rule_ptr + 2 * row)
    last = tl.minimum(tl.load(rule_ptr + 2 * row + 1) - start, BLOCK).to(tl.int32)  # compared as 32-bit offsets
    at = start
    if not SINGLE:
        at += row * length
    if start + BLOCK <= length:
        key = magnitude_key(read(x_ptr + at, offsets, 0, COMPUTE, False))
        keep = (key > threshold.to(key.dtype)) | ((key == threshold.to(key.dtype)) & (offsets <= last))
        tl.store(out_ptr + at + offsets, keep.to(tl.uint8))
    else:
        left = (length - start).to(tl.int32)
        key = magnitude_key(read(x_ptr + at, offsets, left, COMPUTE, True))
        keep = (key > threshold.to(key.dtype)) | ((key == threshold.to(key.dtype)) & (offsets <= last))
        tl.store(out_ptr + at + offsets, keep.to(tl.uint8), mask=offsets < left)


def topk_mask(x: Tensor, k: int, out: Tensor, *, block: int | None = None, sampled: bool | None = None) -> Tensor:
    """Fills `out` (bool, contiguous [R, L]) with the k largest magnitudes of each row of x [R, L], 0 <= k <= L."""
    rows, length = x.shape
    if k == 0 or k == length or not x.numel():
        return out.fill_(k > 0)
    x, compute = x.contiguous(), wide_dtype(x)
    if length <= ROW and not (rows == 1 and length > 4096):  # one long row deserves more than one program
        high, low = (
            (62, 0) if compute == torch.float64 else (30, {torch.bfloat16: 16, torch.float16: 13}.get(x.dtype, 0))
        )
        padded = triton.next_power_of_2(length)
        launch(
            topk_row_kernel, (rows,), x, out.view(torch.uint8), length, k, COMPUTE=tl_dtype(compute), HIGH=high,
            LOW=low, BLOCK=padded, num_warps=warps(min(32, max(1, padded // 512))), device=x.device,
        )  # fmt: skip
        return out
    rules = torch.empty(rows, 2, dtype=torch.int64, device=x.device)
    for begin in range(0, rows, _BATCH):
        batch = range(begin, min(rows, begin + _BATCH))
        select([Segment(None, x[r], k) for r in batch], rules, list(batch), block=block, sampled=sampled)
    step = block or (1 << 17 if INTERPRETING else 2 * block_size(compute))
    for begin in range(0, rows, 65535):  # the grid's second dimension ends there
        end = min(rows, begin + 65535)
        launch(
            rule_mask_kernel, (triton.cdiv(length, step), end - begin), x[begin:end], rules[begin:end],
            out[begin:end].view(torch.uint8), length, SINGLE=rows == 1, COMPUTE=tl_dtype(compute), BLOCK=step, maxnreg=64,
            device=x.device,
        )  # fmt: skip
    return out

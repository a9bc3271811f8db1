"""random_mask: counter-based masks, the draws of fastmerge/ops/philox.py made in the kernel.

Story: nothing is read for a plain mask, so the cost is the Philox calls; one call makes the 16-bit digits of eight
neighbouring elements, and a thread owns whole calls, so that the digits are in the order of memory without a shuffle.
The second digit matters for one element in 65536: a block computes it only when one of its elements is undecided.

consensus_merge draws with the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._jit import bits, block_size, cdiv, jit, launch, narrow, scalar, tl, tl_dtype, wide_dtype


@jit
def digits(call, k0, k1, stream, WHICH: tl.constexpr, BLOCK: tl.constexpr):
    """The 16-bit digits number WHICH of BLOCK elements, those of calls [call, call + BLOCK / 8)."""
    calls = call + tl.arange(0, BLOCK // 8)
    low, high = calls.to(tl.uint32), (calls >> 32).to(tl.uint32)
    c2, c3 = (tl.zeros_like(low) + stream).to(tl.uint32), tl.full(low.shape, WHICH, tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(low, high, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32), 10)
    even = tl.join(tl.join(w0, w2), tl.join(w1, w3)) & 0xFFFF  # [calls, 2, 2]: word = 2 · first + second
    odd = tl.join(tl.join(w0, w2), tl.join(w1, w3)) >> 16
    return tl.join(even, odd).reshape(BLOCK).to(tl.int32)


@jit
def kept_at_random(limit, call, k0, k1, stream, BLOCK: tl.constexpr):
    """Whether each element's draw is below its limit (0 ... 2^32, one or one an element)."""
    high, low = (limit >> 16).to(tl.int32), (limit & 0xFFFF).to(tl.int32)
    digit = digits(call, k0, k1, stream, 0, BLOCK)
    keep = digit < high
    undecided = digit == high
    if tl.max(undecided.to(tl.int32), 0) > 0:
        keep = keep | (undecided & (digits(call, k0, k1, stream, 1, BLOCK) < low))
    return keep


@jit
def _finish(x_ptr, out_ptr, keep, factor, ok, RESCALE: tl.constexpr, COMPUTE: tl.constexpr):
    offsets = tl.arange(0, keep.shape[0])
    if RESCALE:
        x = tl.load(x_ptr + offsets, mask=ok, other=None if ok is None else 0.0).to(COMPUTE)
        y = narrow(tl.where(keep, x * scalar(factor, COMPUTE), 0.0), out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, y, mask=ok)
    else:
        tl.store(out_ptr + offsets, keep.to(tl.uint8), mask=ok)


@jit(do_not_specialize=["first", "span", "divisor", "call", "k0", "k1", "stream", "factor", "shift"])
def random_mask_kernel(
    x_ptr, rank_ptr, out_ptr, n, shift, first, span, divisor, call, k0, k1, stream, factor,
    RANKED: tl.constexpr, RESCALE: tl.constexpr, SHIFTED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A chunk may start inside a call: programs are laid over whole calls, and the first one skips `shift` elements.
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    if SHIFTED:
        start -= shift
    offsets = tl.arange(0, BLOCK)
    call = call.to(tl.int64) + pid * (BLOCK // 8)
    limit = first.to(tl.int64)
    if RANKED:
        ok = (offsets < n - start) & (offsets >= -start)
        rank = tl.load(rank_ptr + start + offsets, mask=ok, other=0).to(tl.int64)
        limit = limit + rank * span.to(tl.int64) // divisor.to(tl.int64)
    keep = kept_at_random(limit, call, k0, k1, stream, BLOCK)
    if SHIFTED:
        _finish(
            x_ptr + start, out_ptr + start, keep, factor, (offsets < n - start) & (offsets >= -start), RESCALE, COMPUTE
        )
    elif start + BLOCK <= n:
        _finish(x_ptr + start, out_ptr + start, keep, factor, None, RESCALE, COMPUTE)
    else:
        _finish(x_ptr + start, out_ptr + start, keep, factor, offsets < n - start, RESCALE, COMPUTE)


def random_mask(
    x: Tensor,
    out: Tensor,
    limits: tuple[int, int, int],
    *,
    key: tuple[int, int],
    stream: int,
    offset: int,
    factor: float | None = None,
    ranks: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Fills `out`, contiguous: bool for a mask, or of x's dtype for x · factor where kept.

    limits: (first, span, divisor): the limit of rank r is ``first + r · span // divisor``; ranks None is rank 0 for all.
    """
    compute = wide_dtype(x)
    shift = offset % 8
    # Two calls a thread, so that a mask is stored 16 bytes at a time; ranks need 64-bit divisions, and so registers.
    block = block or (2 * block_size(compute) if ranks is None else block_size(compute) // 2)
    launch(
        random_mask_kernel,
        (cdiv(out.numel() + shift, block),),
        out if factor is None else x.contiguous(),
        out if ranks is None else ranks.to(torch.int32).contiguous(),
        out.view(torch.uint8) if factor is None else out,
        out.numel(),
        shift,
        *limits,
        offset // 8,
        *key,
        stream,
        bits(1.0 if factor is None else factor, compute),
        RANKED=ranks is not None,
        RESCALE=factor is not None,
        SHIFTED=shift != 0,
        COMPUTE=tl_dtype(compute),
        BLOCK=block,
        maxnreg=64,
        device=out.device,
    )
    return out

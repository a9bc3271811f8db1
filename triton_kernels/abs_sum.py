"""abs_sum: sums of |model − base| over blocks of 65536 elements, float64, all models in one read of the base.

Story: bound by memory. A program owns 4096 elements, keeps the base in registers, takes the models in turn from a table
and writes one partial sum each; sixteen partial sums of a block are added afterwards, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._jit import address, aligned, jit, launch, read, tl, tl_dtype, triton, upload, warps, wide_dtype

_PART, _PARTS = 4096, 16  # elements of a program; programs of a block


@jit
def _sum_block(
    table, sums, step, K, start, left, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, BASE: tl.constexpr,
    X: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK)
    if HAS_BASE:
        base = read(address(table, BASE, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
    for k in tl.range(0, K):
        x = read(address(table + 1 + k, X, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
        if HAS_BASE:
            x = x - base
        tl.store(sums + k * step, tl.sum(tl.abs(x).to(tl.float64), 0))


@jit(do_not_specialize=["K"])
def abs_sum_kernel(
    table_ptr, sum_ptr, K, n, step, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, BASE: tl.constexpr,
    X: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    if start + BLOCK <= n:
        _sum_block(table_ptr, sum_ptr + pid, step, K, start, 0, HAS_BASE, COMPUTE, BASE, X, ALIGNED, False, BLOCK)
    else:
        left = (n - start).to(tl.int32)
        _sum_block(table_ptr, sum_ptr + pid, step, K, start, left, HAS_BASE, COMPUTE, BASE, X, ALIGNED, True, BLOCK)


def abs_sum(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """float64 [K, ceil(N / 65536)] on the models' device."""
    compute = wide_dtype(base, *models)
    base = None if base is None else base.contiguous()
    models = [m.contiguous() for m in models]
    if len({m.dtype for m in models}) > 1:
        models = [m.to(compute) for m in models]  # exact: the compute dtype holds every input dtype
    n, device = models[0].numel(), models[0].device
    blocks = triton.cdiv(n, _PART * _PARTS)
    partial = torch.zeros(len(models), blocks * _PARTS, dtype=torch.float64, device=device)
    addresses = [0 if base is None else base.data_ptr(), *(m.data_ptr() for m in models)]
    launch(
        abs_sum_kernel, (triton.cdiv(n, _PART),), upload(addresses, torch.int64, device), partial, len(models), n,
        blocks * _PARTS, HAS_BASE=base is not None, COMPUTE=tl_dtype(compute),
        BASE=tl_dtype(compute if base is None else base.dtype), X=tl_dtype(models[0].dtype),
        ALIGNED=aligned(base, *models), BLOCK=_PART, num_warps=warps(16), maxnreg=64, device=device,
    )  # fmt: skip
    return partial.view(len(models), blocks, _PARTS).sum(-1)

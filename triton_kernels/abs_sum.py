"""abs_sum: sums of |model − base| over blocks of 65536 elements, float64, all models in one read of the base.

Story: bound by memory. A program owns 1024 elements, 8 a thread; the loads of the base and of up to four models are all in
flight before the first is used, and only then are they summed, one sum a model. More models come four at a time from the
table, the base staying in registers. The 64 partial sums of a block are added afterwards, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._jit import address, aligned, jit, launch, read, tl, tl_dtype, triton, upload, warps, wide_dtype

_PART, _PARTS = 1024, 64  # elements of a program; programs of a block


@jit
def _model(table, start, left, COMPUTE: tl.constexpr, X: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    return read(address(table, X, ALIGNED) + start, tl.arange(0, BLOCK), left, COMPUTE, MASKED)


@jit
def _store(sums, x, base, HAS_BASE: tl.constexpr):
    if HAS_BASE:
        x = x - base
    tl.store(sums, tl.sum(tl.abs(x).to(tl.float64), 0))


@jit
def _sum_block(
    table, sums, step, K, start, left, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, BASE: tl.constexpr,
    X: tl.constexpr, ALIGNED: tl.constexpr, GROUP: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    base = 0.0
    if HAS_BASE:
        base = read(address(table, BASE, ALIGNED) + start, tl.arange(0, BLOCK), left, COMPUTE, MASKED)
    for k in tl.range(0, K, GROUP):
        a = _model(table + 1 + k, start, left, COMPUTE, X, ALIGNED, MASKED, BLOCK)
        if GROUP > 1:
            b = _model(table + 2 + k, start, left, COMPUTE, X, ALIGNED, MASKED, BLOCK)
        if GROUP > 2:
            c = _model(table + 3 + k, start, left, COMPUTE, X, ALIGNED, MASKED, BLOCK)
        if GROUP > 3:
            d = _model(table + 4 + k, start, left, COMPUTE, X, ALIGNED, MASKED, BLOCK)
        _store(sums + k * step, a, base, HAS_BASE)
        if GROUP > 1:
            _store(sums + (k + 1) * step, b, base, HAS_BASE)
        if GROUP > 2:
            _store(sums + (k + 2) * step, c, base, HAS_BASE)
        if GROUP > 3:
            _store(sums + (k + 3) * step, d, base, HAS_BASE)


@jit(do_not_specialize=["K"])
def abs_sum_kernel(
    table_ptr, sum_ptr, K, n, step, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, BASE: tl.constexpr,
    X: tl.constexpr, ALIGNED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    start = pid * BLOCK
    if start + BLOCK <= n:
        _sum_block(
            table_ptr, sum_ptr + pid, step, K, start, 0, HAS_BASE, COMPUTE, BASE, X, ALIGNED, GROUP, False, BLOCK
        )
    else:
        left = (n - start).to(tl.int32)
        _sum_block(
            table_ptr, sum_ptr + pid, step, K, start, left, HAS_BASE, COMPUTE, BASE, X, ALIGNED, GROUP, True, BLOCK
        )


def abs_sum(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """float64 [K, ceil(N / 65536)] on the models' device."""
    compute = wide_dtype(base, *models)
    base = None if base is None else base.contiguous()
    models = [m.contiguous() for m in models]
    if len({m.dtype for m in models}) > 1:
        models = [m.to(compute) for m in models]  # exact: the compute dtype holds every input dtype
    n, device, count = models[0].numel(), models[0].device, len(models)
    blocks = triton.cdiv(n, _PART * _PARTS)
    together = triton.cdiv(count, triton.cdiv(count, 4))  # models of a group; the last one may repeat a model
    padded = triton.cdiv(count, together) * together
    partial = torch.zeros(padded, blocks * _PARTS, dtype=torch.float64, device=device)
    addresses = [0 if base is None else base.data_ptr(), *(m.data_ptr() for m in models)]
    addresses += [addresses[-1]] * (padded - count)
    launch(
        abs_sum_kernel, (triton.cdiv(n, _PART),), upload(addresses, torch.int64, device), partial, padded, n,
        blocks * _PARTS, HAS_BASE=base is not None, COMPUTE=tl_dtype(compute),
        BASE=tl_dtype(compute if base is None else base.dtype), X=tl_dtype(models[0].dtype),
        ALIGNED=aligned(base, *models), GROUP=together, BLOCK=_PART, num_warps=warps(4), maxnreg=64, device=device,
    )  # fmt: skip
    return partial[:count].view(count, blocks, _PARTS).sum(-1)

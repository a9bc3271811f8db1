"""weighted_sum: out = base + scale * (sum_i w_i (model_i - base)) / D, or the same without a base.

Story: bound by memory, so each of the K + 1 inputs is read once and the result written once. A program owns a block of
1024 elements, 8 a thread, so that a 16-bit stream is one 128-bit load a thread. Models are folded in list order in the
compute dtype, the rounding is at the store. A full block needs no mask and keeps its wide loads when N is odd.

Two kernels share the arithmetic: one takes the models as arguments (K is unrolled and every load is in flight at once),
one takes a table of addresses, for many tensors in one grid or for more models than arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._jit import (
    MAX_UNROLLED,
    address,
    aligned,
    bits,
    block_map,
    block_size,
    cdiv,
    divide,
    jit,
    launch,
    read,
    scalar,
    tl,
    tl_dtype,
    upload,
    wide_dtype,
    write,
)


@jit
def _finish(total, base, divisor, scale, ADD_BASE: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    if NORMALIZE:
        total = divide(total, scalar(divisor, COMPUTE), COMPUTE)
    if SCALED:
        total = total * scalar(scale, COMPUTE)
    if ADD_BASE:
        total = base + total
    return total


@jit
def _block(
    base_ptr, model_ptrs, weights, out_ptr, divisor, scale, offsets, start, left,
    HAS_BASE: tl.constexpr, ADD_BASE: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr,
    COMPUTE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    if HAS_BASE:
        base = read(base_ptr + start, offsets, left, COMPUTE, MASKED)
        total = (read(model_ptrs[0] + start, offsets, left, COMPUTE, MASKED) - base) * scalar(weights[0], COMPUTE)
    else:
        base = 0.0
        total = read(model_ptrs[0] + start, offsets, left, COMPUTE, MASKED) * scalar(weights[0], COMPUTE)
    for k in tl.static_range(1, len(model_ptrs)):
        x = read(model_ptrs[k] + start, offsets, left, COMPUTE, MASKED)
        if HAS_BASE:
            x = x - base
        total = total + x * scalar(weights[k], COMPUTE)
    total = _finish(total, base, divisor, scale, ADD_BASE, NORMALIZE, SCALED, COMPUTE)
    write(out_ptr + start, offsets, total, left, MASKED)


@jit(do_not_specialize=["weights", "divisor", "scale"])
def weighted_sum_kernel(
    base_ptr, model_ptrs, weights, out_ptr, n, divisor, scale,
    HAS_BASE: tl.constexpr, ADD_BASE: tl.constexpr, NORMALIZE: tl.constexpr, SCALED: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _block(base_ptr, model_ptrs, weights, out_ptr, divisor, scale, offsets, start, 0,
               HAS_BASE, ADD_BASE, NORMALIZE, SCALED, COMPUTE, False)  # fmt: skip
    else:
        _block(base_ptr, model_ptrs, weights, out_ptr, divisor, scale, offsets, start, (n - start).to(tl.int32),
               HAS_BASE, ADD_BASE, NORMALIZE, SCALED, COMPUTE, True)  # fmt: skip


_HEAD = 6  # table columns before the models: out, base, n, divisor, scale, first program


@jit
def _table_block(
    row, K, offsets, start, left,
    HAS_BASE: tl.constexpr, ADD_BASE: tl.constexpr, NORMALIZE: tl.constexpr, COMPUTE: tl.constexpr,
    BASE: tl.constexpr, MODEL: tl.constexpr, OUT: tl.constexpr, ALIGNED: tl.constexpr, HEAD: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    total = read(address(row + HEAD, MODEL, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
    if HAS_BASE:
        base = read(address(row + 1, BASE, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
        total = total - base
    else:
        base = 0.0
    total = total * scalar(tl.load(row + HEAD + K), COMPUTE)
    for k in tl.range(1, K, loop_unroll_factor=4):
        x = read(address(row + HEAD + k, MODEL, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
        if HAS_BASE:
            x = x - base
        total = total + x * scalar(tl.load(row + HEAD + K + k), COMPUTE)
    # Multiplying by a scale of 1 changes no bit, so the table needs no variant without it.
    total = _finish(total, base, tl.load(row + 3), tl.load(row + 4), ADD_BASE, NORMALIZE, True, COMPUTE)
    write(address(row, OUT, ALIGNED) + start, offsets, total, left, MASKED)


@jit(do_not_specialize=["K"])
def weighted_sum_many_kernel(
    table_ptr, owner_ptr, K,
    HAS_BASE: tl.constexpr, ADD_BASE: tl.constexpr, NORMALIZE: tl.constexpr, COMPUTE: tl.constexpr,
    BASE: tl.constexpr, MODEL: tl.constexpr, OUT: tl.constexpr, ALIGNED: tl.constexpr, HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + pid).to(tl.int64) * (HEAD + 2 * K)
    n = tl.load(row + 2)
    start = (pid - tl.load(row + 5)) * BLOCK
    offsets = tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _table_block(
            row, K, offsets, start, 0, HAS_BASE, ADD_BASE, NORMALIZE, COMPUTE, BASE, MODEL, OUT, ALIGNED, HEAD, False
        )
    else:
        left = (n - start).to(tl.int32)
        _table_block(
            row, K, offsets, start, left, HAS_BASE, ADD_BASE, NORMALIZE, COMPUTE, BASE, MODEL, OUT, ALIGNED, HEAD, True
        )


Job = tuple["Tensor | None", Sequence[Tensor], Sequence[float], "float | None", float, Tensor]


def weighted_sum(
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Sequence[float],
    divisor: float | None,
    scale: float,
    out: Tensor,
    *,
    add_base: bool = True,
    block: int | None = None,
) -> Tensor:
    """Fills `out` (contiguous) from base and K >= 1 models of its shape; divisor None does not normalise."""
    if len(models) > MAX_UNROLLED:
        return weighted_sum_many([(base, models, weights, divisor, scale, out)], add_base=add_base, block=block)[0]
    base = None if base is None else base.contiguous()
    models = tuple(m.contiguous() for m in models)
    compute = wide_dtype(base, *models)
    block = block or block_size(compute)
    launch(
        weighted_sum_kernel,
        (cdiv(out.numel(), block),),
        out if base is None else base,
        models,
        tuple(bits(w, compute) for w in weights),
        out,
        out.numel(),
        bits(1.0 if divisor is None else divisor, compute),
        bits(scale, compute),
        HAS_BASE=base is not None,
        ADD_BASE=base is not None and add_base,
        NORMALIZE=divisor is not None,
        SCALED=scale != 1.0,
        COMPUTE=tl_dtype(compute),
        BLOCK=block,
        maxnreg=64,
        device=out.device,
    )
    return out


def weighted_sum_many(jobs: Sequence[Job], *, add_base: bool = True, block: int | None = None) -> list[Tensor]:
    """Many calls of `weighted_sum` in one grid for each combination of dtypes and number of models."""
    groups: dict[tuple[object, ...], list[Job]] = {}
    for base, models, weights, divisor, scale, out in jobs:
        base = None if base is None else base.contiguous()
        models = [m.contiguous() for m in models]
        compute = wide_dtype(base, *models)
        if len({m.dtype for m in models}) > 1:
            models = [m.to(compute) for m in models]  # exact: the compute dtype holds every input dtype
        key = (compute, base is None, base is not None and base.dtype, models[0].dtype, out.dtype, len(models),
               divisor is None, aligned(base, *models, out), out.device)  # fmt: skip
        if out.numel():
            groups.setdefault(key, []).append((base, models, weights, divisor, scale, out))
    for key, group in groups.items():
        _launch_group(group, key[0], key[7], add_base, block or block_size(key[0]))  # type: ignore[arg-type]
    return [job[5] for job in jobs]


def _launch_group(group: list[Job], compute: torch.dtype, is_aligned: bool, add_base: bool, block: int) -> None:
    owner, first = block_map([job[5].numel() for job in group], block)
    rows: list[int] = []
    for (base, models, weights, divisor, scale, out), start in zip(group, first, strict=True):
        rows += [out.data_ptr(), 0 if base is None else base.data_ptr(), out.numel()]
        rows += [bits(1.0 if divisor is None else divisor, compute), bits(scale, compute), start]
        rows += [m.data_ptr() for m in models]
        rows += [bits(w, compute) for w in weights]
    base, models, _, divisor, _, out = group[0]
    launch(
        weighted_sum_many_kernel,
        (len(owner),),
        upload(rows, torch.int64, out.device),
        upload(owner, torch.int32, out.device),
        len(models),
        HAS_BASE=base is not None,
        ADD_BASE=base is not None and add_base,
        NORMALIZE=divisor is not None,
        COMPUTE=tl_dtype(compute),
        BASE=tl_dtype(compute if base is None else base.dtype),
        MODEL=tl_dtype(models[0].dtype),
        OUT=tl_dtype(out.dtype),
        ALIGNED=is_aligned,
        HEAD=_HEAD,
        BLOCK=block,
        maxnreg=64,
        device=out.device,
    )

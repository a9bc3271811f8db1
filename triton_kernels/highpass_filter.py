"""highpass_filter: remove the low frequencies of every matrix of a batch, in one of three forms, all exact.

Story. The filter's result is x minus its removed part, and the usual masks remove few frequencies.

*pruned*: the removed part is a product with thin matrices of cosines and sines. With the C removed columns of the half
spectrum, E [W, 2C] holds cos and −sin of 2πcw/W; P = x E is the transform along the rows on those columns alone, a small
transform along the other axis and back applies the gains 1 − g, and ``out = x − D Eᵀ``. The shorter axis is contracted first.
x is read twice and written once, the rest is thin; the work is 8·C·H·W flops in `tl.dot`, three TF32 products each. Where C
is large or models are several, lines are folded first: x is read once, and the work is a quarter (_pruned.py).

*staged*: Fourier transforms in `tl.dot` stages (_staged.py).

*fft*: torch.fft makes the transforms; a kernel before it forms the (weighted) delta in the compute dtype, one between
applies the gains from the integer bounds, one after it adds the base, casts and marks matrices that held a NaN or an Inf.

`form` chooses by counting flops and bytes, see there. Each can take the delta Σ wᵢ (modelᵢ − base) instead of x, and add
the base at the end, so that a whole merge needs no other pass. Many matrices of a shape go in the same launches: a program
then takes its addresses and weights from its matrix's row of a table.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._jit import (
    INTERPRETING,
    aligned,
    bits,
    cdiv,
    jit,
    launch,
    narrow,
    scalar,
    tl,
    tl_dtype,
    upload,
    wide_dtype,
)
from ._pruned import (
    GRID,
    SMALL,
    Key,
    Mask,
    folds,
    mask_tables,
    products,
    pruned,
    share_removed,
    thin_axis,
    transformed,
    turns,
)
from ._staged import one_tile, three_launches
from ._stages import TILE, _delta, _inputs, _listed, _load, flops, shape

# Measured on an H100 (docs/gpu.md), in the time in which its memory moves a byte (2.77 TB/s), for each element:
_FOLDED, _PLAIN = (29, 0.056), (12, 0.225)  # the pruned form, and more of it for each removed frequency
_PANEL = 92  # for each removed frequency over the axis' length: the thin panel's own transforms
_STAGED = 0.12  # a flop of the staged form
_FFT = 62  # the fft form: 58 of it cuFFT's pair
_FFT_PRIME = 45  # more for an axis with a prime factor above 7
# and, in that time too, what the host takes for the launches of a call (350, 250, 200 and 200 microseconds).
_HOST = {"folded": 9.7e8, "plain": 6.9e8, "staged": 5.5e8, "fft": 5.5e8}
MOST = 0.75  # of the frequencies, that the pruned form removes: x − low then has twice the error of x
TOGETHER = 1 << 22  # elements of the matrices that go in one launch: their workspace is held at once


class Form(NamedTuple):
    name: str  # "pruned", "staged" or "fft"
    why: str


def form(mask: Mask, compute: torch.dtype) -> Form:
    """The form with the smallest estimate (`costs`).

    A matrix that fits a tile (32 x 32) is staged: one launch. docs/gpu.md has the crossovers.
    """
    return _form(Key(mask), compute)


@functools.lru_cache(maxsize=256)
def _form(key: Key, compute: torch.dtype) -> Form:
    mask = key.mask
    if compute == torch.float64:
        return Form("fft", "float64 goes through torch.fft")
    if max(mask.height, mask.width) <= TILE:
        return Form("staged", f"{mask.height} x {mask.width} fits in a tile: one launch")
    thin, length = thin_axis(key)
    estimate = costs(mask)
    name = min(estimate, key=lambda n: estimate[n])
    each = ", ".join(f"{n} {c:.0f}" for n, c in estimate.items())
    return Form(name, f"{thin} frequencies of {length} removed: {each} bytes' time an element")


def costs(mask: Mask) -> dict[str, float]:
    """Each possible form's estimate, in the time in which memory moves a byte, for each element of x.

    Small matrices share launches with others of their shape, except where torch.fft makes transforms. For them it is what
    the host needs that counts, if that is more; a large one's launches hide behind the work before it. Where little is
    left x minus the rest is less exact than the rest's transform: that is not pruned.
    """
    size, (thin, length) = mask.height * mask.width, thin_axis(Key(mask))

    def least(work: float, launches: str, shared: bool) -> float:
        return max(work, _HOST[launches] / (TOGETHER if shared else size)) if size <= SMALL else work

    folded = folds(mask, False)
    once, each = _FOLDED if folded else _PLAIN
    pruned = least(once + (each + _PANEL / length) * thin, "folded" if folded else "plain", turns(mask))
    fft = least(_FFT + _FFT_PRIME * (_odd(mask.height) + _odd(mask.width)), "fft", False)
    found = {"fft": fft}
    if share_removed(Key(mask)) <= MOST and max(mask.height, mask.width) < 64 * GRID:  # a tile is 64 lines
        found["pruned"] = pruned
    plan = shape(mask.height, mask.width, int(mask.columns[-1]))
    if plan is not None:
        work = (8 if plan.keep else 12) + 16 * plan.share + _STAGED * flops(plan)
        found["staged"] = least(work, "staged", True)
    return found


def _odd(n: int) -> bool:
    """Whether n has a prime factor above 7, for which cuFFT has slower kernels."""
    for p in (2, 3, 5, 7):
        while n % p == 0:
            n //= p
    return n > 1


# ---------------------------------------------------------------------------------------------------------- kernels


@jit(do_not_specialize=["weights"])
def delta_kernel(
    base_ptr, model_ptrs, weights, out_ptr, n, table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Before the transform: the delta in the compute dtype; n elements of one matrix, or (no table) of all."""
    batch = tl.program_id(1).to(tl.int64)
    _, base_ptr, model_ptrs, weights = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    if table_ptr is not None:
        out_ptr += batch * n
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        x = _delta(base_ptr, model_ptrs, weights, at, None, HAS_BASE, WEIGHTED, COMPUTE)
        tl.store(out_ptr + at, x)
    else:
        x = _delta(base_ptr, model_ptrs, weights, at, at < n, HAS_BASE, WEIGHTED, COMPUTE)
        tl.store(out_ptr + at, x, mask=at < n)


@jit
def gain_kernel(
    spectrum_ptr, low_ptr, high_ptr, rows, height, half, count, share, TABLES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Between the transforms: bins of the first `count` columns times (tables whose interval of their row holds the column)
    / tables; of the others nothing is removed."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # real and imaginary parts in turn
    column = at // 2
    inside = tl.zeros((ROWS, BLOCK), tl.int32)
    for t in tl.static_range(TABLES):
        low = tl.load(low_ptr + t * height + row % height)
        high = tl.load(high_ptr + t * height + row % height)
        inside += ((column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])).to(tl.int32)
    ok = (row[:, None] < rows) & (column[None, :] < count)
    place = spectrum_ptr + row[:, None] * (2 * half) + at[None, :]
    value = tl.load(place, mask=ok, other=0.0)
    tl.store(place, tl.where(inside == TABLES, value, value * inside.to(value.dtype) * share), mask=ok)


@jit
def _finish_block(
    value_ptr, base_ptr, sum_ptr, out_ptr, at, ok, size, bins, share, ADD_BASE: tl.constexpr, COMPUTE: tl.constexpr
):
    total = _load(sum_ptr + at // size * bins, ok)  # of all elements: not finite where one is not
    y = tl.where(total - total != 0, float("nan"), _load(value_ptr + at, ok) * share)
    if ADD_BASE:
        y = _load(base_ptr + at, ok).to(COMPUTE) + y
    tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask=ok)


@jit
def finish_kernel(
    value_ptr, base_ptr, sum_ptr, out_ptr, n, size, bins, share, table_ptr, ALIGN: tl.constexpr, K: tl.constexpr,
    ADD_BASE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """After the transform: 1 / its length, base, cast, and NaN for matrices that held one; n as in `delta_kernel`.

    sum_ptr: the first of the `bins` real numbers of every matrix' spectrum.
    """
    batch = tl.program_id(1).to(tl.int64)
    out_ptr = _listed(table_ptr, batch, 0, K, out_ptr, ALIGN)
    base_ptr = _listed(table_ptr, batch, 1, K, base_ptr, ALIGN)
    if table_ptr is not None:
        value_ptr += batch * n
        sum_ptr += batch * bins
    share = scalar(share, COMPUTE)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _finish_block(value_ptr, base_ptr, sum_ptr, out_ptr, at, None, size, bins, share, ADD_BASE, COMPUTE)
    else:
        _finish_block(value_ptr, base_ptr, sum_ptr, out_ptr, at, at < n, size, bins, share, ADD_BASE, COMPUTE)


# --------------------------------------------------------------------------------------------------------- launcher


class Job(NamedTuple):
    """One matrix (or a batch of them) of `highpass_filter_many`; see `highpass_filter`."""

    models: Sequence[Tensor]
    out: Tensor
    mask: Mask
    base: Tensor | None = None
    weights: Sequence[float] | None = None
    add_base: bool = False
    tf32: bool = False


def highpass_filter(
    models: Sequence[Tensor],
    out: Tensor,
    mask: Mask,
    base: Tensor | None = None,
    weights: Sequence[float] | None = None,
    add_base: bool = False,
    tf32: bool = False,
    *,
    which: str | None = None,
) -> Tensor:
    """Fills `out` [..., H, W] with the filtered models[0], or with (base +) the filtered Σ wᵢ (modelᵢ − base).

    Models and out are contiguous tensors of one shape; `which` overrules the choice of form; `tf32` gives up accuracy
    (about 1e-3 of x) for one product instead of three.
    """
    compute = wide_dtype(base, *models)
    batch = out.numel() // (mask.height * mask.width)
    flags = {"HAS_BASE": base is not None, "WEIGHTED": weights is not None, "table_ptr": None, "ALIGN": 1}
    run = _RUN[which or form(mask, compute).name]
    scalars = tuple(bits(w, compute) for w in (weights or [1.0]))
    for begin in range(0, batch, GRID):
        end = min(batch, begin + GRID)
        parts = (models[0] if base is None else base, *models, out)
        if end - begin < batch:
            parts = tuple(t.view(batch, mask.height, mask.width)[begin:end] for t in parts)
        run((parts[0], parts[1:-1], scalars), flags, parts[-1], mask, end - begin, compute, add_base, tf32)
    return out


def highpass_filter_many(jobs: Sequence[Job], *, which: str | None = None) -> None:
    """Many calls of `highpass_filter`, with the same bits: one grid for all matrices of a shape, a mask and dtypes.

    Where torch.fft makes transforms they go one matrix at a time: with several, its bits can be others. As many as have
    TOGETHER elements go at once; workspace, at most 16 bytes an element of float32, is held for that many.
    """
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        tensors = [job.out, *([] if job.base is None else [job.base]), *job.models]
        key = (Key(job.mask), job.out.device, *(t.dtype for t in tensors), job.base is None, job.weights is None,
               job.add_base, job.tf32, aligned(*tensors))  # fmt: skip
        if job.out.numel() > job.mask.height * job.mask.width:
            highpass_filter(*job, which=which)  # a batch: one grid already
        else:
            groups.setdefault(key, []).append(job)
    for group in groups.values():
        size = group[0].out.numel()
        most = max(1, min(GRID, TOGETHER // size))
        for begin in range(0, len(group), most):
            part = group[begin : begin + most]
            if len(part) == 1:
                highpass_filter(*part[0], which=which)
            else:
                _launch_group(part, which)


def _launch_group(group: Sequence[Job], which: str | None) -> None:
    models, out, mask, base, weights, add_base, tf32 = group[0]
    compute = wide_dtype(base, *models)
    rows: list[list[int]] = []
    for job in group:
        tensors = (job.out, job.models[0] if job.base is None else job.base, *job.models)
        rows.append([t.data_ptr() for t in tensors] + [bits(w, compute) for w in (job.weights or [1.0])])
    flags = {
        "HAS_BASE": base is not None, "WEIGHTED": weights is not None, "table_ptr": upload(rows, torch.int64, out.device),
        "ALIGN": 16 if aligned(out, base, *models) else 1,
    }  # fmt: skip
    source = (models[0] if base is None else base, tuple(models), tuple(rows[0][2 + len(models) :]))
    _RUN[which or form(mask, compute).name](source, flags, out, mask, len(group), compute, add_base, tf32)


def _staged(source, flags, out, mask, batch, _compute, add_base, tf32):  # type: ignore[no-untyped-def]
    run = one_tile if max(mask.height, mask.width) <= TILE else three_launches
    run(source, flags, out, mask, batch, add_base, products(tf32))


@functools.lru_cache(maxsize=64)
def _fft_tables(key: Key, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The mask's lower and upper bounds [T, H], and the flat indices of its ring's bins."""
    bounds, ring = mask_tables(key, device)
    ring = ring.long()
    return bounds[..., 0].contiguous(), bounds[..., 1].contiguous(), ring[:, 0] * (key.mask.width // 2 + 1) + ring[:, 1]


def _through_fft(source, flags, out, mask, batch, compute, add_base, _tf32):  # type: ignore[no-untyped-def]
    height, width, device = mask.height, mask.width, out.device
    size, half, tables = height * width, width // 2 + 1, mask.bounds.shape[0]
    listed = flags["table_ptr"] is not None
    n, matrices = (size, batch) if listed else (batch * size, 1)  # a row of programs for each matrix, or one for all
    block = 1 << 16 if INTERPRETING else 1024
    first = source[1][0]
    if not listed and not flags["HAS_BASE"] and not flags["WEIGHTED"] and first.dtype == compute:
        value = first.view(batch, height, width)
    else:
        value = torch.empty(batch, height, width, dtype=compute, device=device)
        launch(delta_kernel, (cdiv(n, block), matrices), *source, value, n, COMPUTE=tl_dtype(compute), BLOCK=block,
               device=device, **flags)  # fmt: skip
    spectrum = transformed(torch.fft.rfft2, value, flags)
    del value
    low, high, where = _fft_tables(Key(mask), device)
    bins = spectrum.view(batch, -1)
    raised = bins[:, where] / tables if len(where) else None
    count = int(mask.columns[-1]) + 1
    rows, tile = (1024, 128) if INTERPRETING else (4, 256)
    launch(
        gain_kernel, (cdiv(batch * height, rows), cdiv(2 * count, tile)), torch.view_as_real(spectrum),
        low, high, batch * height, height, half, count, 1.0 / tables, TABLES=tables, ROWS=rows, BLOCK=tile, device=device,
    )  # fmt: skip
    if raised is not None:
        bins.index_add_(1, where, raised)
    value = transformed(lambda s: torch.fft.irfft2(s, s=(height, width), norm="forward"), spectrum, flags)
    launch(finish_kernel, (cdiv(n, block), matrices), value, source[0], torch.view_as_real(spectrum), out, n, size,
           2 * height * half, bits(1 / size, compute), flags["table_ptr"], ALIGN=flags["ALIGN"], K=len(source[1]), ADD_BASE=add_base, COMPUTE=tl_dtype(compute), BLOCK=block,
           device=device)  # fmt: skip


_RUN = {"pruned": pruned, "staged": _staged, "fft": _through_fft}

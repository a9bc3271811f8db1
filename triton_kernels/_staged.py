"""highpass_filter's staged form: Fourier transforms in `tl.dot` stages (_stages.py), in one launch or in three.

*One tile*: a matrix of at most 32 x 32 is read once, transformed in registers by plain products and written once.

*Three launches*, the data of two rows or two columns at a time on chip: rows forward (x is read, the removed columns of its
half spectrum are written), columns forward, gain and back (in place), rows back (x − low, base, cast). Only the blocks of
n1 columns that hold a removed one are computed and stored; where that is most of them, the kept part is transformed back
instead and x is not read again. The spectrum lies in memory so that every access is whole sectors, both ways: 2 rows
x 2 columns x (re, im) of float32 are the 32 bytes of one sector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._jit import INTERPRETING, jit, launch, target, tl, warps
from ._pruned import Key, mask_tables
from ._stages import (
    Shape,
    _add_product,
    _delta,
    _factor,
    _finish,
    _inputs,
    _listed,
    _roots,
    _times,
    matrix,
    padded,
    shape,
    twiddles,
)


@jit(do_not_specialize=["weights", "rings", "columns"])
def one_tile_kernel(
    base_ptr, model_ptrs, weights, tall_ptr, wide_ptr, bounds_ptr, ring_ptr, rings, out_ptr, columns, height, width, share,
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, ADD_BASE: tl.constexpr, TABLES: tl.constexpr,
    PRECISION: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """A program filters one matrix: the removed columns by a product, the other axis there and back, x − low."""
    i, j = tl.arange(0, PH)[:, None], tl.arange(0, PW)[None, :]
    ok = (i < height) & (j < width)
    batch = tl.program_id(0).to(tl.int64)
    first, base_ptr, model_ptrs, weights = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    at = first * height * width + i * width + j
    x = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32)
    bad = tl.max(tl.max(((x - x) != 0).to(tl.int32), 1), 0) > 0
    low = tl.zeros((PH, PW), tl.float32)
    for start in tl.range(0, columns, 16):  # of the half spectrum, so that registers suffice
        c = start + tl.arange(0, 16)
        rows = wide_ptr + tl.arange(0, PW)[:, None] * PW + c[None, :]
        pr = tl.dot(x, tl.load(rows), input_precision=PRECISION)
        pi = tl.dot(x, tl.load(rows + PW * PW), input_precision=PRECISION)
        fr, fi = _roots(tall_ptr, PH, PH, 1)
        qr, qi = _times(fr, fi, pr, pi, PRECISION)
        factor = _factor(bounds_ptr, ring_ptr, rings, i, c[None, :], height, width, 0, TABLES) * share
        dr, di = _times(fr, -fi, qr * factor, qi * factor, PRECISION)
        back = wide_ptr + c[:, None] * PW + j
        low = tl.dot(dr, tl.load(back), low, input_precision=PRECISION)
        low = tl.dot(di, tl.load(back + PW * PW), low, input_precision=PRECISION)
    out_ptr = _listed(table_ptr, batch, 0, len(model_ptrs), out_ptr, ALIGN)
    _finish(base_ptr, out_ptr, at, ok, x - low, bad, ADD_BASE)


@jit(do_not_specialize=["weights"])
def rows_forward_kernel(
    base_ptr, model_ptrs, weights, first_ptr, twiddle_ptr, second_ptr, spectrum_ptr, bad_ptr, height, N1, N2, blocks,
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """The first `blocks` blocks of N1 columns of the transforms of two rows; notes a NaN or an Inf."""
    pair, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, j = tl.arange(0, P1)[:, None], tl.arange(0, 2 * P2)[None, :]
    row, c = 2 * pair + j // P2, j % P2
    ok = (i < N1) & (c < N2) & (row < height)
    first, base_ptr, model_ptrs, weights = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    at = (first * height + row) * (N1 * N2) + i * N2 + c
    x = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32)
    if tl.max(tl.max(((x - x) != 0).to(tl.int32), 1), 0) > 0:
        tl.atomic_max(bad_ptr + batch, 1)
    fr, fi = _roots(first_ptr, P1, P1, 1)
    ar = tl.dot(fr, x, input_precision=PRECISION)  # [k1, (row, j2)]
    ai = tl.dot(fi, x, input_precision=PRECISION)
    twiddle = twiddle_ptr + i * P2 + c
    tr, ti = tl.load(twiddle), tl.load(twiddle + P1 * P2)
    br = (ar * tr - ai * ti).reshape(2 * P1, P2)
    bi = (ar * ti + ai * tr).reshape(2 * P1, P2)
    q = tl.arange(0, P2)[:, None] * P2 + tl.arange(0, Q)[None, :]
    cr, ci = _times(br, bi, tl.load(second_ptr + q), tl.load(second_ptr + P2 * P2 + q), PRECISION)
    # [k1, row, pair of blocks, block, (re, im)] -> [k1, pair of blocks, row, block, (re, im)]
    value = tl.join(cr, ci).reshape(P1, 2, Q // 2, 4).permute(0, 2, 1, 3).reshape(P1, 4 * Q)
    k = tl.arange(0, 4 * Q)[None, :]
    place = spectrum_ptr + ((batch * tl.num_programs(0) + pair) * N1 + i) * (4 * blocks) + k
    tl.store(place, value, mask=(i < N1) & (k < 4 * blocks))


@jit
def _there_and_back(
    br, bi, dr, di, second_ptr, bounds_ptr, ring_ptr, rings, ky1, kx, start, height, width, H1, H2, share, keep,
    TABLES: tl.constexpr, PRECISION: tl.constexpr, P2: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """STEP frequencies of the second stage: forward, times the factor, and what they give back, added to (dr, di)."""
    ky2 = start + tl.arange(0, STEP)[None, :]
    s = second_ptr + tl.arange(0, P2)[:, None] * P2 + ky2
    cr, ci = _times(br, bi, tl.load(s), tl.load(s + P2 * P2), PRECISION)  # [(ky1, block), ky2]
    ky = tl.where((ky1 < H1) & (ky2 < H2), ky1 + H1 * ky2, height)
    factor = _factor(bounds_ptr, ring_ptr, rings, ky, kx, height, width, keep, TABLES) * share
    tl.debug_barrier()  # the table is read again, instead of held in registers that spill
    s = second_ptr + (start + tl.arange(0, STEP)[:, None]) * P2 + tl.arange(0, P2)[None, :]
    return _add_product(dr, di, cr * factor, ci * factor, tl.load(s), -tl.load(s + P2 * P2), PRECISION)


@jit(do_not_specialize=["rings", "keep"])
def columns_kernel(
    spectrum_ptr, first_ptr, twiddle_ptr, second_ptr, bounds_ptr, ring_ptr, rings, height, width, N1, H1, H2, blocks, share, keep,
    TABLES: tl.constexpr, PRECISION: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Two columns (of neighbouring blocks): transform, gain, transform back, in place."""
    k1, pair, batch = tl.program_id(0) % N1, tl.program_id(0) // N1, tl.program_id(1).to(tl.int64)
    pairs = (height + 1) // 2
    j = tl.arange(0, 4 * P2)[None, :]  # (h2, block, (re, im))
    h1, h2 = tl.arange(0, P1)[:, None], j // 4
    h = h1 * H2 + h2
    ok = (h1 < H1) & (h2 < H2)
    place = ((batch * pairs + h // 2) * N1 + k1) * (4 * blocks) + 8 * pair + h % 2 * 4 + j % 4
    ar = tl.zeros((P1, 2 * P2), tl.float32)
    ai = tl.zeros((P1, 2 * P2), tl.float32)
    for start in tl.range(0, H1, 16):  # in pieces, so that registers suffice
        g1 = start + tl.arange(0, 16)[:, None]
        g = g1 * H2 + h2
        at = ((batch * pairs + g // 2) * N1 + k1) * (4 * blocks) + 8 * pair + g % 2 * 4 + j % 4
        x = tl.load(spectrum_ptr + at, mask=(g1 < H1) & (h2 < H2), other=0.0)
        xr, xi = x.reshape(16, 2 * P2, 2).split()
        f = first_ptr + tl.arange(0, P1)[:, None] * P1 + start + tl.arange(0, 16)[None, :]
        fr, fi = tl.load(f), tl.load(f + P1 * P1)
        ar, ai = _add_product(ar, ai, fr, fi, xr, xi, PRECISION)  # [ky1, (h2, block)]
    tr, ti = _roots(twiddle_ptr, P1, P2, 2)
    br = (ar * tr - ai * ti).reshape(P1, P2, 2).permute(0, 2, 1).reshape(2 * P1, P2)
    bi = (ar * ti + ai * tr).reshape(P1, P2, 2).permute(0, 2, 1).reshape(2 * P1, P2)
    line = tl.arange(0, 2 * P1)[:, None]
    kx = k1 + N1 * (2 * pair + line % 2)
    dr = tl.zeros((2 * P1, P2), tl.float32)
    di = tl.zeros((2 * P1, P2), tl.float32)
    if STEP < P2:
        for start in tl.range(0, H2, STEP):
            dr, di = _there_and_back(
                br, bi, dr, di, second_ptr, bounds_ptr, ring_ptr, rings, line // 2, kx, start, height, width, H1, H2, share,
                keep, TABLES, PRECISION, P2, STEP,
            )  # fmt: skip
    else:
        dr, di = _there_and_back(
            br, bi, dr, di, second_ptr, bounds_ptr, ring_ptr, rings, line // 2, kx, 0, height, width, H1, H2, share,
            keep, TABLES, PRECISION, P2, STEP,
        )  # fmt: skip
    tl.debug_barrier()  # so that the tables are read again, instead of held in registers that spill
    fr, fi = _roots(first_ptr, P1, P1, 1)
    tr, ti = _roots(twiddle_ptr, P1, P2, 2)
    dr = dr.reshape(P1, 2, P2).permute(0, 2, 1).reshape(P1, 2 * P2)
    di = di.reshape(P1, 2, P2).permute(0, 2, 1).reshape(P1, 2 * P2)
    yr, yi = _times(fr, -fi, dr * tr + di * ti, di * tr - dr * ti, PRECISION)  # [h1, (h2, block)]
    tl.store(spectrum_ptr + place, tl.join(yr, yi).reshape(P1, 4 * P2), mask=ok)


@jit(do_not_specialize=["weights"])
def rows_back_kernel(
    base_ptr, model_ptrs, weights, first_ptr, twiddle_ptr, second_ptr, spectrum_ptr, bad_ptr, out_ptr, height, N1, N2, blocks,
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, ADD_BASE: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
):  # fmt: skip
    """out = (base +) delta − what the columns give for two rows; KEEP: (base +) what they give."""
    pair, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, P1)[:, None]
    br = tl.zeros((2 * P1, P2), tl.float32)
    bi = tl.zeros((2 * P1, P2), tl.float32)
    for start in tl.range(0, blocks, 16):  # in pieces, so that registers suffice
        k = 4 * start + tl.arange(0, 64)[None, :]
        place = spectrum_ptr + ((batch * tl.num_programs(0) + pair) * N1 + i) * (4 * blocks) + k
        value = tl.load(place, mask=(i < N1) & (k < 4 * blocks), other=0.0)
        cr, ci = value.reshape(P1, 8, 2, 4).permute(0, 2, 1, 3).reshape(2 * P1, 16, 2).split()
        q = second_ptr + (start + tl.arange(0, 16)[:, None]) * P2 + tl.arange(0, P2)[None, :]
        br, bi = _add_product(br, bi, cr, ci, tl.load(q), -tl.load(q + P2 * P2), PRECISION)
    br, bi = br.reshape(P1, 2 * P2), bi.reshape(P1, 2 * P2)  # [k1, (row, j2)]
    j = tl.arange(0, 2 * P2)[None, :]
    row, c = 2 * pair + j // P2, j % P2
    twiddle = twiddle_ptr + i * P2 + c
    tr, ti = tl.load(twiddle), tl.load(twiddle + P1 * P2)
    fr, fi = _roots(first_ptr, P1, P1, 1)
    y = tl.dot(fr, br * tr + bi * ti, input_precision=PRECISION)
    y = tl.dot(fi, bi * tr - br * ti, y, input_precision=PRECISION)
    ok = (i < N1) & (c < N2) & (row < height)
    first, base_ptr, model_ptrs, weights = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    out_ptr = _listed(table_ptr, batch, 0, len(model_ptrs), out_ptr, ALIGN)
    at = (first * height + row) * (N1 * N2) + i * N2 + c
    if KEEP == 0:
        y = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32) - y
    _finish(base_ptr, out_ptr, at, ok, y, tl.load(bad_ptr + batch) != 0, ADD_BASE)


def one_tile(source: Any, flags: Any, out: Tensor, mask: Any, batch: int, add_base: bool, precision: str) -> None:
    height, width, device = mask.height, mask.width, out.device
    ph, pw = padded(height), padded(width)
    tables = mask.bounds.shape[0]
    launch(
        one_tile_kernel, (batch,), *source, matrix(height, ph, device), matrix(width, pw, device),
        *mask_tables(Key(mask), device), len(mask.ring), out,
        int(mask.columns[-1]) + 1, height, width, 1.0 / (height * width * tables), ADD_BASE=add_base, TABLES=tables,
        PRECISION=precision, PH=ph, PW=pw, num_warps=warps(4), device=device, **flags,
    )  # fmt: skip


def three_launches(source: Any, flags: Any, out: Tensor, mask: Any, batch: int, add_base: bool, precision: str) -> None:
    height, width, device = mask.height, mask.width, out.device
    plan = shape(height, width, int(mask.columns[-1]))
    assert plan is not None
    rows, pairs, tables, keep = plan.rows, -(-height // 2), mask.bounds.shape[0], int(plan.keep)
    spectrum = torch.empty(batch, pairs, rows.n1, plan.blocks // 2, 8, dtype=torch.float32, device=device)
    bad = torch.zeros(batch, dtype=torch.int32, device=device)
    p1, p2 = rows.padded
    lines = (matrix(rows.n1, p1, device), twiddles(rows, device), matrix(rows.n2, p2, device))
    always = {"PRECISION": precision, "device": device, "num_warps": warps(8)}
    sizes = {"P1": p1, "P2": p2, **always, **flags}
    grid = (pairs, batch)
    launch(rows_forward_kernel, grid, *source, *lines, spectrum, bad, height, *rows, plan.blocks,
           Q=min(padded(plan.blocks), p2), **sizes)  # fmt: skip
    _columns(plan, spectrum, mask, batch, {"TABLES": tables, **always})
    launch(rows_back_kernel, grid, *source, *lines, spectrum, bad, out, height, *rows, plan.blocks,
           ADD_BASE=add_base, KEEP=keep, **sizes)  # fmt: skip


def _columns(plan: Shape, spectrum: Tensor, mask: Any, batch: int, meta: dict[str, Any]) -> None:
    tall, n1, device = plan.tall, plan.rows.n1, spectrum.device
    upon = *mask_tables(Key(mask), device), len(mask.ring)
    share = 1.0 / (mask.height * mask.width * meta["TABLES"])
    hopper = (
        not INTERPRETING and target().backend == "cuda" and target().arch // 10 == 9
    )  # its products take more registers
    h1, h2 = tall.padded
    launch(
        columns_kernel, (n1 * plan.blocks // 2, batch), spectrum, matrix(tall.n1, h1, device), twiddles(tall, device),
        matrix(tall.n2, h2, device), *upon, mask.height, mask.width, n1, tall.n1, tall.n2, plan.blocks, share, int(plan.keep),
        P1=h1, P2=h2, STEP=h2 if hopper else 16,  # in pieces, so that registers suffice; Hopper wants it whole
        **meta,
    )  # fmt: skip

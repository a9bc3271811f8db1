"""highpass_filter's staged form: a four-step Fourier transform in `tl.dot` stages, in one launch or in three.

Story. A transform of length n1·n2 is two stages of products with small matrices of roots of unity, and a product with
twiddles between them: with j = j1·n2 + j2 and k = k1 + n1·k2, jk/n = j1·k1/n1 + j2·k1/n + j2·k2/n2. The matrices are at
most 32 wide and may have any size up to that: they are padded to 16 or 32, so a radix need not be prime or even. (Products
of 64 x 64, for lengths above 1024, spill on every GPU; those lengths go through torch.fft.)

*One tile*: a matrix of at most 32 x 32 is read once, transformed in registers by plain products and written once.

*Three launches*, the data of two rows or two columns at a time on chip: rows forward (x is read, the removed columns of its
half spectrum are written), columns forward, gain and back (in place), rows back (x − low, base, cast). Only the blocks of
n1 columns that hold a removed one are computed and stored; where that is most of them, the kept part is transformed back
instead and x is not read again. The spectrum lies in memory so that every access is whole sectors, both ways: 2 rows
x 2 columns x (re, im) of float32 are the 32 bytes of one sector.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._jit import INTERPRETING, jit, launch, narrow, scalar, target, tl, upload, warps

RADIX = 32  # largest stage
TILE = 32  # largest matrix of one tile


class Stages(NamedTuple):
    """n = n1 · n2."""

    n1: int
    n2: int

    @property
    def padded(self) -> tuple[int, int]:
        return padded(self.n1), padded(self.n2)


def padded(n: int) -> int:
    """The power of two that a stage of n is padded to; `tl.dot` needs 16."""
    return 1 << max(4, (n - 1).bit_length())


@functools.lru_cache(maxsize=256)
def stages(n: int) -> Stages | None:
    """The two stages of a transform of length n with the least padding; None where it has none of at most RADIX."""
    found = [Stages(n // b, b) for b in range(1, RADIX + 1) if n % b == 0 and n // b <= RADIX]
    return min(found, key=lambda s: (s.padded[0] * s.padded[1], s.padded[0], s.n1), default=None)


class Shape(NamedTuple):
    """How the three launches lay out the spectrum of [height, width] matrices with `columns` of interest."""

    rows: Stages  # of the transforms along a row, of length width
    tall: Stages
    blocks: int  # blocks of rows.n1 columns that are stored, an even number
    keep: bool  # the kept part comes back, instead of the removed part

    @property
    def share(self) -> float:
        """Columns stored, of the whole spectrum."""
        return self.blocks / self.rows.n2


def shape(height: int, width: int, last: int) -> Shape | None:
    """The layout for a mask whose last touched column is `last`; None where a length has no stages."""
    rows, tall = stages(width), stages(height)
    if rows is None or tall is None:
        return None
    every = width // 2 // rows.n1 + 1  # blocks that hold the columns 0 ... width // 2
    some = last // rows.n1 + 1
    keep = 16 * (every - some) < 4 * rows.n2  # the rest of the spectrum, 4 ways, is less than x again
    count = every if keep else some
    return Shape(rows, tall, count + count % 2, keep)


def flops(s: Shape) -> float:
    """Of the three launches, for each element of x, padding included."""
    p1, p2, q = *s.rows.padded, padded(s.blocks)
    rows = 2 * (4 * p1 + 8 * q) * (p1 * p2) / (s.rows.n1 * s.rows.n2)
    t1, t2 = s.tall.padded
    return rows + 16 * (t1 + t2) * (t1 * t2) / (s.tall.n1 * s.tall.n2) * s.share


# ---------------------------------------------------------------------------------------------------------- kernels


@jit
def _add_product(r, i, ar, ai, br, bi, PRECISION: tl.constexpr):
    """(r, i) + the complex product a · b of matrices."""
    r = tl.dot(ar, br, r, input_precision=PRECISION)
    r = tl.dot(ai, -bi, r, input_precision=PRECISION)
    i = tl.dot(ar, bi, i, input_precision=PRECISION)
    i = tl.dot(ai, br, i, input_precision=PRECISION)
    return r, i


@jit
def _times(ar, ai, br, bi, PRECISION: tl.constexpr):
    """The complex product a · b of matrices."""
    zero = tl.zeros((ar.shape[0], br.shape[1]), tl.float32)
    return _add_product(zero, zero, ar, ai, br, bi, PRECISION)


@jit
def _roots(ptr, P: tl.constexpr, Q: tl.constexpr, DEPTH: tl.constexpr):
    """cos and −sin from a table [2, P, Q], each column DEPTH times."""
    j = tl.arange(0, Q * DEPTH) // DEPTH
    at = tl.arange(0, P)[:, None] * Q + j[None, :]
    return tl.load(ptr + at), tl.load(ptr + P * Q + at)


@jit
def _factor(bounds_ptr, ring_ptr, rings, ky, kx, height, width, TABLES: tl.constexpr, KEEP: tl.constexpr):
    """1 − gain (KEEP: the gain) of bins from the integer bounds, times what a bin and its mirror weigh."""
    ok = (ky < height) & (kx <= width // 2)
    count = tl.zeros(ky.shape, tl.int32) + kx * 0
    row = tl.minimum(ky, height - 1)
    for t in tl.static_range(TABLES):
        low = tl.load(bounds_ptr + 2 * (t * height + row))
        high = tl.load(bounds_ptr + 2 * (t * height + row) + 1)
        count += ((kx >= low) & (kx < high)).to(tl.int32)
    for i in tl.range(0, rings):
        hit = (ky == tl.load(ring_ptr + 2 * i)) & (kx == tl.load(ring_ptr + 2 * i + 1))
        count += hit.to(tl.int32)
    if KEEP == 0:
        count = TABLES - count
    twice = tl.where((kx == 0) | (2 * kx == width), 1, 2)
    return tl.where(ok, count * twice, 0).to(tl.float32)


@jit
def _load(ptrs, ok):
    """Elements, 0 where not `ok`; None: all of them, and then the loads are wide."""
    return tl.load(ptrs, mask=ok, other=None if ok is None else 0.0)


@jit
def _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr):  # fmt: skip
    """Σ wᵢ (modelᵢ − base), or the one model as it is."""
    x = _load(model_ptrs[0] + at, ok).to(COMPUTE)
    if HAS_BASE:
        base = _load(base_ptr + at, ok).to(COMPUTE)
        x = x - base
    if WEIGHTED:
        x = x * scalar(weights[0], COMPUTE)
        for k in tl.static_range(1, len(model_ptrs)):
            y = _load(model_ptrs[k] + at, ok).to(COMPUTE)
            if HAS_BASE:
                y = y - base
            x = x + y * scalar(weights[k], COMPUTE)
    return x


@jit
def _finish(base_ptr, out_ptr, at, ok, y, bad, ADD_BASE: tl.constexpr):
    y = tl.where(bad, float("nan"), y)
    if ADD_BASE:
        y = tl.load(base_ptr + at, mask=ok, other=0.0).to(tl.float32) + y
    tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask=ok)


@jit(do_not_specialize=["weights", "rings", "columns"])
def one_tile_kernel(
    base_ptr, model_ptrs, weights, tall_ptr, wide_ptr, bounds_ptr, ring_ptr, rings, out_ptr, columns, height, width, share,
    HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, ADD_BASE: tl.constexpr, TABLES: tl.constexpr,
    PRECISION: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
):  # fmt: skip
    """A program filters one matrix: the removed columns by a product, the other axis there and back, x − low."""
    i, j = tl.arange(0, PH)[:, None], tl.arange(0, PW)[None, :]
    ok = (i < height) & (j < width)
    at = tl.program_id(0).to(tl.int64) * height * width + i * width + j
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
        factor = _factor(bounds_ptr, ring_ptr, rings, i, c[None, :], height, width, TABLES, 0) * share
        dr, di = _times(fr, -fi, qr * factor, qi * factor, PRECISION)
        back = wide_ptr + c[:, None] * PW + j
        low = tl.dot(dr, tl.load(back), low, input_precision=PRECISION)
        low = tl.dot(di, tl.load(back + PW * PW), low, input_precision=PRECISION)
    _finish(base_ptr, out_ptr, at, ok, x - low, bad, ADD_BASE)


@jit(do_not_specialize=["weights"])
def rows_forward_kernel(
    base_ptr, model_ptrs, weights, first_ptr, twiddle_ptr, second_ptr, spectrum_ptr, bad_ptr, height, N1, N2, blocks,
    HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    Q: tl.constexpr,
):  # fmt: skip
    """The first `blocks` blocks of N1 columns of the transforms of two rows; notes a NaN or an Inf."""
    pair, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, j = tl.arange(0, P1)[:, None], tl.arange(0, 2 * P2)[None, :]
    row, c = 2 * pair + j // P2, j % P2
    ok = (i < N1) & (c < N2) & (row < height)
    at = (batch * height + row) * (N1 * N2) + i * N2 + c
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
    br, bi, dr, di, second_ptr, bounds_ptr, ring_ptr, rings, ky1, kx, start, height, width, H1, H2, share,
    TABLES: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, P2: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """STEP frequencies of the second stage: forward, times the factor, and what they give back, added to (dr, di)."""
    ky2 = start + tl.arange(0, STEP)[None, :]
    s = second_ptr + tl.arange(0, P2)[:, None] * P2 + ky2
    cr, ci = _times(br, bi, tl.load(s), tl.load(s + P2 * P2), PRECISION)  # [(ky1, block), ky2]
    ky = tl.where((ky1 < H1) & (ky2 < H2), ky1 + H1 * ky2, height)
    factor = _factor(bounds_ptr, ring_ptr, rings, ky, kx, height, width, TABLES, KEEP) * share
    tl.debug_barrier()  # the table is read again, instead of held in registers that spill
    s = second_ptr + (start + tl.arange(0, STEP)[:, None]) * P2 + tl.arange(0, P2)[None, :]
    return _add_product(dr, di, cr * factor, ci * factor, tl.load(s), -tl.load(s + P2 * P2), PRECISION)


@jit(do_not_specialize=["rings"])
def columns_kernel(
    spectrum_ptr, first_ptr, twiddle_ptr, second_ptr, bounds_ptr, ring_ptr, rings, height, width, N1, H1, H2, blocks, share,
    TABLES: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
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
                TABLES, KEEP, PRECISION, P2, STEP,
            )  # fmt: skip
    else:
        dr, di = _there_and_back(
            br, bi, dr, di, second_ptr, bounds_ptr, ring_ptr, rings, line // 2, kx, 0, height, width, H1, H2, share,
            TABLES, KEEP, PRECISION, P2, STEP,
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
    HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, ADD_BASE: tl.constexpr, KEEP: tl.constexpr,
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
    at = (batch * height + row) * (N1 * N2) + i * N2 + c
    if KEEP == 0:
        y = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32) - y
    _finish(base_ptr, out_ptr, at, ok, y, tl.load(bad_ptr + batch) != 0, ADD_BASE)


# --------------------------------------------------------------------------------------------------------- launchers


@functools.lru_cache(maxsize=64)
def _matrix(n: int, p: int, device: torch.device) -> Tensor:
    """float32 [2, p, p]: cos and −sin of 2π jk/n for j, k < n, zeros around."""
    return _table(n, n, n, p, p, device)


@functools.lru_cache(maxsize=64)
def _twiddles(s: Stages, device: torch.device) -> Tensor:
    """float32 [2, p1, p2] of 2π k1·j2 / (n1·n2)."""
    return _table(s.n1, s.n2, s.n1 * s.n2, *s.padded, device)


def _table(rows: int, columns: int, n: int, p: int, q: int, device: torch.device) -> Tensor:
    angle = 2 * math.pi * ((torch.arange(rows)[:, None] * torch.arange(columns)) % n).double() / n
    table = torch.zeros(2, p, q)
    table[0, :rows, :columns] = angle.cos()
    table[1, :rows, :columns] = -angle.sin()
    return upload(table, torch.float32, device)


def one_tile(source: Any, flags: Any, out: Tensor, mask: Any, batch: int, add_base: bool, precision: str) -> None:
    height, width, device = mask.height, mask.width, out.device
    ph, pw = padded(height), padded(width)
    tables = mask.bounds.shape[0]
    launch(
        one_tile_kernel, (batch,), *source, _matrix(height, ph, device), _matrix(width, pw, device),
        upload(mask.bounds, torch.int32, device), upload(mask.ring, torch.int32, device), len(mask.ring), out,
        int(mask.columns[-1]) + 1, height, width, 1.0 / (height * width * tables), ADD_BASE=add_base, TABLES=tables,
        PRECISION=precision, PH=ph, PW=pw, num_warps=warps(4), device=device, **flags,
    )  # fmt: skip


def three_launches(source: Any, flags: Any, out: Tensor, mask: Any, batch: int, add_base: bool, precision: str) -> None:
    height, width, device = mask.height, mask.width, out.device
    plan = shape(height, width, int(mask.columns[-1]))
    assert plan is not None
    rows, tall = plan.rows, plan.tall
    pairs = -(-height // 2)
    spectrum = torch.empty(batch, pairs, rows.n1, plan.blocks // 2, 8, dtype=torch.float32, device=device)
    bad = torch.zeros(batch, dtype=torch.int32, device=device)
    (p1, p2), q, tables = rows.padded, padded(plan.blocks), mask.bounds.shape[0]
    wide = _matrix(rows.n1, p1, device), _twiddles(rows, device), _matrix(rows.n2, p2, device)
    meta = {"P1": p1, "P2": p2, "PRECISION": precision, "num_warps": warps(8), "device": device}
    launch(rows_forward_kernel, (pairs, batch), *source, *wide, spectrum, bad, height, rows.n1, rows.n2, plan.blocks,
           Q=min(q, p2), **meta, **flags)  # fmt: skip
    h1, h2 = tall.padded
    # The second stage in pieces, so that registers suffice; the products of compute capability 9 want it whole.
    step = h2 if not INTERPRETING and target().backend == "cuda" and target().arch // 10 == 9 else 16
    launch(
        columns_kernel, (rows.n1 * plan.blocks // 2, batch), spectrum, _matrix(tall.n1, h1, device), _twiddles(tall, device),
        _matrix(tall.n2, h2, device), upload(mask.bounds, torch.int32, device), upload(mask.ring, torch.int32, device),
        len(mask.ring), height, width, rows.n1, tall.n1, tall.n2, plan.blocks, 1.0 / (height * width * tables),
        TABLES=tables, KEEP=int(plan.keep), PRECISION=precision, P1=h1, P2=h2, STEP=step, num_warps=warps(8), device=device,
    )  # fmt: skip
    launch(rows_back_kernel, (pairs, batch), *source, *wide, spectrum, bad, out, height, rows.n1, rows.n2, plan.blocks,
           ADD_BASE=add_base, KEEP=int(plan.keep), **meta, **flags)  # fmt: skip

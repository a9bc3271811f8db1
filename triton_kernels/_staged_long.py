"""The three launches of highpass_filter's staged form for lengths of three stages, up to 16³ = 4096.

With n = n1·n2·n3, j = (j1·n2 + m1)·n3 + m2 and k = k1 + n1·(q1 + n2·q2):

    jk/n = j1·k1/n1 + [m1·k1/(n1·n2) + m2·k1/n] + m1·q1/n2 + m2·q1/(n2·n3) + m2·q2/n3    (mod 1)

three products with [16, 16] matrices, and twiddles between them that come from three tables of that size. Six tables are
one tensor, see `tables`. The two rows or columns of a program are `lane`, an index that goes along. Two rows at a time take
more registers than some GPUs have (`lanes`): rows then go one after the other, the second one's bins or the first one's
waiting. Two columns go together everywhere, but only a few values of m2 at a time: the third stage adds them up, and back
it makes those few first. What waits in between are the bins, and of those only the values of q2 that the gain leaves
(`_stages.kept`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._jit import INTERPRETING, jit, target, tl
from ._stages import LONG, Stages, _delta, _factor, _finish, _inputs, _listed, _load, table


@functools.lru_cache(maxsize=64)
def tables(s: Stages, device: torch.device) -> Tensor:
    """float32 [6, 2, 16, 16]: cos and −sin of the three stages' matrices and of the three twiddles of the formula above."""
    n1, n2, n3 = s
    parts = [(n, n, n) for n in s] + [(n1, n2, n1 * n2), (n1, n3, n1 * n2 * n3), (n2, n3, n2 * n3)]
    return torch.stack([table(*p, LONG, LONG, device) for p in parts])


def lanes() -> tuple[int, int]:
    """(rows, values of m2 of two columns) at a time: what the compiled kernels have registers for."""
    if INTERPRETING:
        return 2, LONG
    return (1 if target().backend == "cuda" and target().arch // 10 == 12 else 2), 4


def spills(rows: Stages) -> bool:
    """Whether the row kernels of these three stages spill on this GPU (40 to 58 words, measured by compiling): `form` then
    takes another form. Masks of stages below 16 take the registers that two targets do not have."""
    if INTERPRETING or rows.n3 == 1 or not torch.cuda.is_available() or target().backend != "cuda":
        return False
    few = {8: rows[:2], 12: rows}.get(target().arch // 10, (LONG,))
    return min(few) < LONG


@jit
def _square(tables_ptr, which: tl.constexpr, P: tl.constexpr):
    """The matrix of a stage."""
    at = tables_ptr + (which * 2 * P * P + tl.arange(0, P)[:, None] * P + tl.arange(0, P)[None, :])
    return tl.load(at), tl.load(at + P * P)


@jit
def _product(ar, ai, br, bi, PRECISION: tl.constexpr):
    """The complex product of a long and a square matrix; everything with the real part first: fewer operands at a time."""
    r = tl.dot(ar, br, input_precision=PRECISION)
    i = tl.dot(ar, bi, input_precision=PRECISION)
    r = tl.dot(ai, -bi, r, input_precision=PRECISION)
    i = tl.dot(ai, br, i, input_precision=PRECISION)
    return r, i


@jit
def _turned(r, i, tables_ptr, which: tl.constexpr, row, column, BACK: tl.constexpr, P: tl.constexpr):
    """(r, i) times a twiddle, or (BACK) its conjugate."""
    tl.debug_barrier()  # tables are loaded one after another, where they are used: registers are scarce
    at = tables_ptr + (which * 2 * P * P + row * P + column)
    tr, ti = tl.load(at), tl.load(at + P * P)
    if BACK:
        ti = -ti
    return r * tr - i * ti, r * ti + i * tr


@jit
def _middle(
    ar, ai, tables_ptr, start, PRECISION: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr
):
    """After the first product, [(lane, m1, m2), k1]: twiddles, second stage, twiddles; [lane, m2, k1, q1].

    Of m2 the STEP values from `start` on.
    """
    line, c = tl.arange(0, LANES * P * STEP)[:, None], tl.arange(0, P)[None, :]
    ar, ai = _turned(ar, ai, tables_ptr, 3, c, line // STEP % P, 0, P)
    ar, ai = _turned(ar, ai, tables_ptr, 4, c, start + line % STEP, 0, P)
    br = ar.reshape(LANES, P, STEP, P).permute(0, 2, 3, 1).reshape(LANES * STEP * P, P)  # [(lane, m2, k1), m1]
    bi = ai.reshape(LANES, P, STEP, P).permute(0, 2, 3, 1).reshape(LANES * STEP * P, P)
    fr, fi = _square(tables_ptr, 1, P)
    br, bi = _product(br, bi, fr, fi, PRECISION)
    br, bi = _turned(br, bi, tables_ptr, 5, c, start + line // P % STEP, 0, P)
    return br.reshape(LANES, STEP, P, P), bi.reshape(LANES, STEP, P, P)


@jit
def _middle_back(br, bi, tables_ptr, start, PRECISION: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """`_middle` the other way: [(lane, q1, k1), m2] to [(lane, m1, m2), k1], for the last product."""
    line, c = tl.arange(0, LANES * P * STEP)[:, None], tl.arange(0, P)[None, :]
    br = br.reshape(LANES, P, P, STEP).permute(0, 3, 2, 1).reshape(LANES * STEP * P, P)  # [(lane, m2, k1), q1]
    bi = bi.reshape(LANES, P, P, STEP).permute(0, 3, 2, 1).reshape(LANES * STEP * P, P)
    br, bi = _turned(br, bi, tables_ptr, 5, c, start + line // P % STEP, 1, P)
    fr, fi = _square(tables_ptr, 1, P)
    br, bi = _product(br, bi, fr, -fi, PRECISION)
    ar = br.reshape(LANES, STEP, P, P).permute(0, 3, 1, 2).reshape(LANES * P * STEP, P)  # [(lane, m1, m2), k1]
    ai = bi.reshape(LANES, STEP, P, P).permute(0, 3, 1, 2).reshape(LANES * P * STEP, P)
    ar, ai = _turned(ar, ai, tables_ptr, 3, c, line // STEP % P, 1, P)
    return _turned(ar, ai, tables_ptr, 4, c, start + line % STEP, 1, P)


@jit
def _finer(ar, ai, tables_ptr, PRECISION: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr):
    """After the first product, [(lane, m1, m2), k1]: second and third stage, [(lane, q1, k1), q2]."""
    br, bi = _middle(ar, ai, tables_ptr, 0, PRECISION, P, LANES, P)
    br = br.permute(0, 3, 2, 1).reshape(LANES * P * P, P)  # [(lane, q1, k1), m2]
    bi = bi.permute(0, 3, 2, 1).reshape(LANES * P * P, P)
    fr, fi = _square(tables_ptr, 2, P)
    return _product(br, bi, fr, fi, PRECISION)


@jit
def _coarser(cr, ci, tables_ptr, PRECISION: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr):
    """Back: [(lane, q1, k1), q2] to [(lane, m1, m2), k1], for the last product."""
    fr, fi = _square(tables_ptr, 2, P)
    br, bi = _product(cr, ci, fr, -fi, PRECISION)
    return _middle_back(br, bi, tables_ptr, 0, PRECISION, P, LANES, P)


@jit
def _place(N2, N3, blocks, WHOLE: tl.constexpr, P: tl.constexpr):
    """Where (q2, q1 / 2, lane, q1 % 2, (re, im)) of two rows lie within a pair's blocks; which of them exist."""
    e = tl.arange(0, 4 * P * P)[None, :]
    if WHOLE:  # n2 = P: in order
        return e, e < 4 * blocks
    else:
        q1, q2 = e // 8 % (P // 2) * 2 + e // 2 % 2, e // (4 * P)
        q = q1 + N2 * q2
        return q // 2 * 8 + e // 4 % 2 * 4 + q % 2 * 2 + e % 2, (q1 < N2) & (q2 < N3) & (q < blocks)


@jit
def _rows(first, batch, height, N1, N2, N3, P: tl.constexpr, LANES: tl.constexpr):
    """Where the rows first, ... start, their elements as [(lane, m1, m2), j1], and which exist; narrow, to spare registers."""
    line, j1 = tl.arange(0, LANES * P * P)[:, None], tl.arange(0, P)[None, :]
    lane, m1, m2 = line // (P * P), line // P % P, line % P
    ok = (j1 < N1) & (m1 < N2) & (m2 < N3) & (lane < height - first)
    width = N1 * N2 * N3
    return (batch * height + first) * width, lane * width + (j1 * N2 + m1) * N3 + m2, ok


@jit
def _forward(x, tables_ptr, bad, PRECISION: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr):
    """The transforms [(row, q1, k1), q2] of rows [(row, m1, m2), j1]; notes a NaN or an Inf."""
    if tl.max(tl.max(((x - x) != 0).to(tl.int32), 1), 0) > 0:
        tl.atomic_max(bad, 1)
    fr, fi = _square(tables_ptr, 0, P)
    ar = tl.dot(x, fr, input_precision=PRECISION)  # [(row, m1, m2), k1]
    ai = tl.dot(x, fi, input_precision=PRECISION)
    return _finer(ar, ai, tables_ptr, PRECISION, P, LANES)


@jit(do_not_specialize=["weights"])
def long_rows_forward_kernel(
    base_ptr, model_ptrs, weights, tables_ptr, spectrum_ptr, bad_ptr, height, N1, N2, N3, blocks,
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, P: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The first `blocks` blocks of N1 columns of the transforms of two rows, LANES at a time."""
    pair, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, base_ptr, model_ptrs, weights = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    if LANES == 2:
        start, at, ok = _rows(2 * pair, first, height, N1, N2, N3, P, 2)
        x = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32, start)
        cr, ci = _forward(x, tables_ptr, bad_ptr + batch, PRECISION, P, 2)
        value = tl.join(cr, ci).reshape(2, P // 2, 2, P, P, 2)  # [row, q1 / 2, q1 % 2, k1, q2, (re, im)]
    else:
        vr = tl.zeros((P * P, P), tl.float32)
        vi, wr, wi = vr, vr, vr
        for lane in tl.range(0, 2):  # the first one's result waits: whole sectors
            start, at, ok = _rows(2 * pair + lane, first, height, N1, N2, N3, P, 1)
            x = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32, start)
            cr, ci = _forward(x, tables_ptr, bad_ptr + batch, PRECISION, P, 1)
            vr, vi, wr, wi = wr, wi, cr, ci
        value = tl.join(tl.join(vr, vi), tl.join(wr, wi)).reshape(P // 2, 2, P, P, 2, 2).permute(5, 0, 1, 2, 3, 4)
    # -> [k1, (q2, q1 / 2, row, q1 % 2, (re, im))]
    value = value.permute(3, 4, 1, 0, 2, 5).reshape(P, 4 * P * P)
    e, stored = _place(N2, N3, blocks, WHOLE, P)
    k1 = tl.arange(0, P)[:, None]
    line = ((batch * tl.num_programs(0) + pair) * N1 + k1) * (4 * blocks)
    tl.store(spectrum_ptr + line + e, value, mask=(k1 < N1) & stored)


@jit
def _columns(first, start, zero, H1, H2, H3, stride, P: tl.constexpr, STEP: tl.constexpr):
    """Of two columns (of the blocks first, first + 1) STEP of the values of m2, as [(m1, m2, lane, (re, im)), h1].

    `stride` between pairs of rows; and which of them exist.
    """
    again = start * zero
    j, h1 = again + tl.arange(0, 4 * P * STEP)[:, None], again + tl.arange(0, P)[None, :]
    m1, m2 = j // (4 * STEP), start + j // 4 % STEP
    h = (h1 * H2 + m1) * H3 + m2
    return h // 2 * stride + h % 2 * 4 + first * 4 + j % 4, (h1 < H1) & (m1 < H2) & (m2 < H3)


@jit
def _kept(i, H3, low, P: tl.constexpr, Q: tl.constexpr):
    """The i-th of the Q values of q2 that the gain leaves: the first `low` and the last ones."""
    if Q == P:
        q2 = i
    else:
        q2 = tl.where(i < low, i, H3 - Q + i)
    return q2


@jit
def _third(tables_ptr, start, H3, low, BACK: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, STEP: tl.constexpr):
    """The third stage as a real matrix, because `tl.dot` wants depths of 16, and complex products would be STEP or Q deep:
    [(m2, lane, (re, im)), (lane, q2, (re, im))], zero where the lanes differ; BACK: [(q2, (re, im)), (m2, (re, im))].
    """
    if BACK:
        m, q = tl.arange(0, 2 * STEP)[None, :], tl.arange(0, 2 * Q)[:, None]
        m2, ok = m // 2, None
    else:
        m, q = tl.arange(0, 4 * STEP)[:, None], tl.arange(0, 4 * Q)[None, :]
        m2, ok = m // 4, m // 2 % 2 == q // (2 * Q)
    same = m % 2 == q % 2  # cos, else -sin; one offset, because sums of pointers take twice the registers
    at = (start + m2) * P + _kept(q // 2 % Q, H3, low, P, Q) + tl.where(same, 4 * P * P, 5 * P * P)
    f = _load(tables_ptr + at, ok)
    return tl.where(same | (m % 2 == 0), f, -f)


@jit(do_not_specialize=["rings", "keep", "low", "zero"])
def long_columns_kernel(
    spectrum_ptr, tables_ptr, bounds_ptr, ring_ptr, rings, height, width, N1, H1, H2, H3, low, blocks, share, one, zero, keep,
    TABLES: tl.constexpr, PRECISION: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Two columns (of neighbouring blocks), STEP of the values of m2 at a time: transform, gain, transform back, in place.

    Q, low: the values of q2 that the gain leaves, see `_stages.kept`; the others are not computed.
    one = 1.0 and zero = 0, which the compiler does not know: it would split the bins for 3xTF32 before the second loop,
    and compute addresses before either, and hold all that in registers that spill.
    """
    k1, first, batch = tl.program_id(0) % N1, tl.program_id(0) // N1 * 2, tl.program_id(1).to(tl.int64)
    here = spectrum_ptr + (batch * ((height + 1) // 2) * N1 + k1) * (4 * blocks)
    c = tl.zeros((P * P, 4 * Q), tl.float32)  # [(q1, ky1), (lane, q2, (re, im))]
    for start in tl.range(0, H3, STEP):
        place, ok = _columns(first, start, zero, H1, H2, H3, N1 * 4 * blocks, P, STEP)
        x = tl.load(here + place, mask=ok, other=0.0)
        xr, xi = x.reshape(P * STEP, 2, 2, P).permute(1, 0, 3, 2).reshape(2 * P * STEP, P, 2).split()
        fr, fi = _square(tables_ptr, 0, P)
        ar, ai = _product(xr, xi, fr, fi, PRECISION)  # [(lane, m1, m2), ky1]
        br, bi = _middle(ar, ai, tables_ptr, start, PRECISION, P, 2, STEP)
        br = br.permute(3, 2, 1, 0).reshape(P * P, 2 * STEP)  # [(q1, ky1), (m2, lane)]
        bi = bi.permute(3, 2, 1, 0).reshape(P * P, 2 * STEP)
        tl.debug_barrier()
        f = _third(tables_ptr, start, H3, low, 0, P, Q, STEP)
        c = tl.dot(tl.join(br, bi).reshape(P * P, 4 * STEP), f, c, input_precision=PRECISION)
    line, q2 = tl.arange(0, 2 * P * P)[:, None], _kept(tl.arange(0, Q)[None, :], H3, low, P, Q)
    q1, ky1 = line // P % P, line % P
    ky = tl.where((q1 < H2) & (ky1 < H1) & (q2 < H3), ky1 + H1 * (q1 + H2 * q2), height)
    kx = k1 + N1 * (first + line // (P * P))
    tl.debug_barrier()
    factor = _factor(bounds_ptr, ring_ptr, rings, ky, kx, height, width, keep, TABLES) * share
    tl.debug_barrier()
    c = c.reshape(P * P, 2, 2 * Q).permute(1, 0, 2).reshape(2 * P * P, Q, 2)
    c = (c * factor[:, :, None]).reshape(2 * P * P, 2 * Q)
    for start in tl.range(0, H3, STEP):
        tl.debug_barrier()
        c = c * one
        f = _third(tables_ptr, start, H3, low, 1, P, Q, STEP)
        br, bi = tl.dot(c, f, input_precision=PRECISION).reshape(2 * P * P, STEP, 2).split()
        ar, ai = _middle_back(br, bi, tables_ptr, start, PRECISION, P, 2, STEP)
        fr, fi = _square(tables_ptr, 0, P)
        yr, yi = _product(ar, ai, fr, -fi, PRECISION)  # [(lane, m1, m2), h1]
        y = tl.join(yr, yi).reshape(2, P * STEP, P, 2).permute(1, 0, 3, 2).reshape(4 * P * STEP, P)
        place, ok = _columns(first, start, zero, H1, H2, H3, N1 * 4 * blocks, P, STEP)
        tl.store(here + place, y, mask=ok)


@jit
def _back(cr, ci, tables_ptr, PRECISION: tl.constexpr, P: tl.constexpr, LANES: tl.constexpr):
    """Rows [(row, m1, m2), j1] of spectra [(row, q1, k1), q2]."""
    ar, ai = _coarser(cr, ci, tables_ptr, PRECISION, P, LANES)  # [(row, m1, m2), k1]
    fr, fi = _square(tables_ptr, 0, P)
    y = tl.dot(ar, fr, input_precision=PRECISION)
    return tl.dot(ai, fi, y, input_precision=PRECISION)


@jit(do_not_specialize=["weights"])
def long_rows_back_kernel(
    base_ptr, model_ptrs, weights, tables_ptr, spectrum_ptr, bad_ptr, out_ptr, height, N1, N2, N3, blocks,
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, ADD_BASE: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr, P: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """out = (base +) delta − what the columns give for two rows, LANES at a time; KEEP: (base +) what they give."""
    pair, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k1 = tl.arange(0, P)[:, None]
    e, stored = _place(N2, N3, blocks, WHOLE, P)
    line = ((batch * tl.num_programs(0) + pair) * N1 + k1) * (4 * blocks)
    value = tl.load(spectrum_ptr + line + e, mask=(k1 < N1) & stored, other=0.0)
    value = value.reshape(P, P, P // 2, 2, 2, 2)  # [k1, q2, q1 / 2, row, q1 % 2, (re, im)]
    bad = tl.load(bad_ptr + batch) != 0
    if LANES == 2:
        cr, ci = value.permute(3, 2, 4, 0, 1, 5).reshape(2 * P * P, P, 2).split()
        y = _back(cr, ci, tables_ptr, PRECISION, P, 2)
        first, base, models, scalars = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
        start, at, ok = _rows(2 * pair, first, height, N1, N2, N3, P, 2)
        if KEEP == 0:
            y = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, start) - y
        out = _listed(table_ptr, batch, 0, len(model_ptrs), out_ptr, ALIGN)
        _finish(base + start, out + start, at, ok, y, bad, ADD_BASE)
    else:
        now, later = value.permute(2, 4, 0, 1, 5, 3).reshape(P * P, P, 2, 2).split()
        for lane in tl.range(0, 2):
            cr, ci = now.split()
            y = _back(cr, ci, tables_ptr, PRECISION, P, 1)
            first, base, models, scalars = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
            start, at, ok = _rows(2 * pair + lane, first, height, N1, N2, N3, P, 1)
            if KEEP == 0:
                y = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, start) - y
            out = _listed(table_ptr, batch, 0, len(model_ptrs), out_ptr, ALIGN)
            _finish(base + start, out + start, at, ok, y, bad, ADD_BASE)
            now = later

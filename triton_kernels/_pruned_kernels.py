"""The device code of highpass_filter's pruned form; _pruned.py tells the story and launches it."""

from __future__ import annotations

import math

from ._jit import jit, tl
from ._stages import _delta, _finish, _inputs, _listed

ROOT_HALF = tl and tl.constexpr(math.sqrt(0.5))


@jit
def _coarse(x):
    """x to 11 bits, to nearest, and finite: what is not stays in x − coarse."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = tl.minimum((bits & 0x7FFFFFFF) + 4096, 0x7F7FFFFF) & -8192
    return (rounded | (bits & -2147483648)).to(tl.float32, bitcast=True)


@jit
def _dot(x, table_ptr, other, ok, total, PRECISION: tl.constexpr):
    """total + x · table, a table in two parts of tf32 (`_pruned.parts`), `other` apart.

    Three TF32 products, as `tl.dot` makes them for "tf32x3"; but the table's parts come from memory, and go to the tensor
    cores without passing registers, instead of being split again by every program: 90 Tflop/s against 20 on an H100.
    Their sums of a step are added to the total by an ordinary addition: tensor cores truncate, and over thousands of
    products in their accumulators that is a relative 1e-5, 100 times what it is now.
    """
    high = tl.load(table_ptr, mask=ok, other=0.0)
    zero = tl.zeros(total.shape, tl.float32)
    if PRECISION == "tf32x3":
        low = tl.load(table_ptr + other, mask=ok, other=0.0)
        coarse = _coarse(x)
        step = tl.dot(x - coarse, high, zero, input_precision="tf32")  # a NaN or an Inf is in here
        step = tl.dot(coarse, low, step, input_precision="tf32")
        step = tl.dot(coarse, high, step, input_precision="tf32")
    elif PRECISION == "tf32":
        step = tl.dot(x, high, zero, input_precision="tf32")
    else:
        low = tl.load(table_ptr + other, mask=ok, other=0.0)
        step = tl.dot(x, high + low, zero, input_precision="ieee")
    return total + step


@jit(do_not_specialize=["weights"])
def fold_kernel(
    base_ptr, model_ptrs, weights, out_ptr, M, K, stride_m, stride_k, size, table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr,
    WEIGHTED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of every line of delta the real transform of length 8 across its 8 parts of K elements: out [M, 8, K].

    Sum, alternating sum, (re, im) of 2, (re, im) of 1 and of 3 are at the places 0, 1, 4, 5, 2, 3, 6, 7. A line is a row of
    the matrix, or a column, which is a row of out.
    """
    batch, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(K, BK)
    m = (tl.program_id(0) // blocks * BM + tl.arange(0, BM))[:, None]
    k = (tl.program_id(0) % blocks * BK + tl.arange(0, BK))[None, :]
    ok = (m < M) & (k < K)
    first, base, models, scalars = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    at = first * size + m.to(tl.int64) * stride_m + k.to(tl.int64) * stride_k
    part = K.to(tl.int64) * stride_k
    x0 = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32)
    x4 = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, 4 * part)
    x2 = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, 2 * part)
    x6 = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, 6 * part)
    s0, d0, s2, d2 = x0 + x4, x0 - x4, x2 + x6, x2 - x6
    x1 = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, part)
    x5 = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, 5 * part)
    x3 = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, 3 * part)
    x7 = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32, 7 * part)
    s1, d1, s3, d3 = x1 + x5, x1 - x5, x3 + x7, x3 - x7
    place = out_ptr + batch * size + m.to(tl.int64) * (8 * K) + k
    even, odd = s0 + s2, s1 + s3
    u, v = (d1 - d3) * ROOT_HALF, (d1 + d3) * ROOT_HALF
    tl.store(place, even + odd, mask=ok)
    tl.store(place + K, even - odd, mask=ok)
    tl.store(place + 2 * K, d0 + u, mask=ok)
    tl.store(place + 3 * K, -v - d2, mask=ok)
    tl.store(place + 4 * K, s0 - s2, mask=ok)
    tl.store(place + 5 * K, s3 - s1, mask=ok)
    tl.store(place + 6 * K, d0 - u, mask=ok)
    tl.store(place + 7 * K, d2 - v, mask=ok)


@jit
def unfold_kernel(
    folded_ptr, base_ptr, bad_ptr, out_ptr, M, K, stride_m, stride_k, size, table_ptr, ALIGN: tl.constexpr, MODELS: tl.constexpr,
    ADD_BASE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`fold_kernel` the other way: out = (base +) the lines."""
    batch, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(K, BK)
    m = (tl.program_id(0) // blocks * BM + tl.arange(0, BM))[:, None]
    k = (tl.program_id(0) % blocks * BK + tl.arange(0, BK))[None, :]
    ok = (m < M) & (k < K)
    place = folded_ptr + batch * size + m.to(tl.int64) * (8 * K) + k
    a1, a3 = tl.load(place + 2 * K, mask=ok, other=0.0), tl.load(place + 6 * K, mask=ok, other=0.0)
    b1, b3 = tl.load(place + 3 * K, mask=ok, other=0.0), tl.load(place + 7 * K, mask=ok, other=0.0)
    total, alternating = tl.load(place, mask=ok, other=0.0), tl.load(place + K, mask=ok, other=0.0)
    a2, b2 = tl.load(place + 4 * K, mask=ok, other=0.0), tl.load(place + 5 * K, mask=ok, other=0.0)
    u, v = (a1 - a3) * ROOT_HALF, (b1 + b3) * -ROOT_HALF
    d0, d1, d2, d3 = a1 + a3, u + v, b3 - b1, v - u  # twice what they are there, and so are these
    even, odd = (total + alternating) * 0.5, (total - alternating) * 0.5
    s0, s1, s2, s3 = even + a2, odd - b2, even - a2, odd + b2
    out_ptr = _listed(table_ptr, batch, 0, MODELS, out_ptr, ALIGN)
    base_ptr = _listed(table_ptr, batch, 1, MODELS, base_ptr, ALIGN)
    first = batch if table_ptr is None else batch * 0
    at = first * size + m.to(tl.int64) * stride_m + k.to(tl.int64) * stride_k
    part = K.to(tl.int64) * stride_k
    bad = tl.load(bad_ptr + batch) != 0
    _finish(base_ptr, out_ptr, at, ok, (s0 + d0) * 0.25, bad, ADD_BASE)
    _finish(base_ptr, out_ptr, at + part, ok, (s1 + d1) * 0.25, bad, ADD_BASE)
    _finish(base_ptr, out_ptr, at + 2 * part, ok, (s2 + d2) * 0.25, bad, ADD_BASE)
    _finish(base_ptr, out_ptr, at + 3 * part, ok, (s3 + d3) * 0.25, bad, ADD_BASE)
    _finish(base_ptr, out_ptr, at + 4 * part, ok, (s0 - d0) * 0.25, bad, ADD_BASE)
    _finish(base_ptr, out_ptr, at + 5 * part, ok, (s1 - d1) * 0.25, bad, ADD_BASE)
    _finish(base_ptr, out_ptr, at + 6 * part, ok, (s2 - d2) * 0.25, bad, ADD_BASE)
    _finish(base_ptr, out_ptr, at + 7 * part, ok, (s3 - d3) * 0.25, bad, ADD_BASE)


@jit(do_not_specialize=["weights"])
def project_kernel(
    base_ptr, model_ptrs, weights, basis_ptr, out_ptr, bad_ptr, M, K, N, stride_m, stride_k, size, out_m, out_c,
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """delta[M, K] · basis[N, K]ᵀ, of every group of K of a line and every matrix of the batch; notes what is not finite.

    An element that is not finite makes its line's sums so, and so does one that overflows in a sum.
    """
    batch, blocks = tl.program_id(2).to(tl.int64), tl.cdiv(N, BN)
    group = tl.program_id(0) // blocks
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    first, base, models, scalars = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    origin = first * size + m[:, None].to(tl.int64) * stride_m + (group * K).to(tl.int64) * stride_k
    basis_ptr += group * 2 * N * K
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)
        at, ok = origin + k[None, :].to(tl.int64) * stride_k, (m[:, None] < M) & (k[None, :] < K)
        x = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32)
        inside = (k[:, None] < K) & (n[None, :] < N)
        total = _dot(x, basis_ptr + n[None, :] * K + k[:, None], N * K, inside, total, PRECISION)
    columns = tl.num_programs(0) // blocks * N
    column = group * N + n[None, :]
    column_at = (column // 2).to(tl.int64) * out_c + column % 2
    place = out_ptr + batch * M * columns + m[:, None].to(tl.int64) * out_m + column_at
    ok = (m[:, None] < M) & (n[None, :] < N)
    tl.store(place, total, mask=ok)
    odd = ((total - total) != 0) & ok
    if tl.max(tl.max(odd.to(tl.int32), 1), 0) > 0:
        tl.atomic_max(bad_ptr + batch, 1)


@jit(do_not_specialize=["weights"])
def subtract_kernel(
    base_ptr, model_ptrs, weights, thin_ptr, basis_ptr, bad_ptr, out_ptr, M, K, N, stride_m, stride_n, size,
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, ADD_BASE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = (base +) delta − thin[M, K] · basis[N, K]ᵀ, of every group of N of a line and K columns of thin."""
    batch, blocks = tl.program_id(2).to(tl.int64), tl.cdiv(N, BN)
    group = tl.program_id(0) // blocks
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    low = tl.zeros((BM, BN), tl.float32)
    columns = tl.num_programs(0) // blocks * K
    thin_ptr += batch * M * columns + group * K
    basis_ptr += group * 2 * N * K
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)
        d = tl.load(thin_ptr + m[:, None].to(tl.int64) * columns + k[None, :],
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        inside = (n[None, :] < N) & (k[:, None] < K)
        low = _dot(d, basis_ptr + n[None, :] * K + k[:, None], N * K, inside, low, PRECISION)
    ok = (m[:, None] < M) & (n[None, :] < N)
    first, base, models, scalars = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    out_ptr = _listed(table_ptr, batch, 0, len(model_ptrs), out_ptr, ALIGN)
    at = first * size + m[:, None].to(tl.int64) * stride_m + (group * N + n[None, :]).to(tl.int64) * stride_n
    y = _delta(base, models, scalars, at, ok, HAS_BASE, WEIGHTED, tl.float32) - low
    _finish(base, out_ptr, at, ok, y, tl.load(bad_ptr + batch) != 0, ADD_BASE)


@jit
def turn_kernel(
    thin_ptr, coarse_ptr, fine_ptr, factor_ptr, out_ptr, M, K, N, bins, steps, parts, rows, BACK: tl.constexpr, PRECISION: tl.constexpr,
    STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[M, N] = roots[M, K] · thin[K, N] of complex numbers, (re, im) in turn along N, of every matrix of the batch.

    Rows to bins, which are multiplied by their factors, as sums of `rows` rows each, so that enough programs have work; or
    BACK, the sum of these `parts` by the conjugate roots. The root of a bin and a row is that of the row's multiple of STEP,
    times that of the rest.
    """
    batch, columns = tl.program_id(2).to(tl.int64), tl.cdiv(N, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    part = tl.program_id(0) // columns
    begin, end, first = part * rows, tl.minimum(part * rows + rows, K), batch
    if BACK:
        begin, end, first = 0, K, batch * parts
    c = tl.zeros((BM, BN), tl.float32)
    s = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(begin, end, BK):
        k = start + tl.arange(0, BK)
        here = thin_ptr + first * K * N + k[:, None] * N + n[None, :]
        inside = (k[:, None] < K) & (n[None, :] < N)
        x = tl.load(here, mask=inside, other=0.0)
        if BACK:
            for i in tl.range(1, parts):
                x += tl.load(here + i * K * N, mask=inside, other=0.0)
        ok = (m[:, None] < M) & (k[None, :] < K)
        if BACK:
            coarse = coarse_ptr + k[None, :] * steps + tl.program_id(1) * BM // STEP
            fine = fine_ptr + k[None, :] * STEP + m[:, None] % STEP
        else:
            coarse = coarse_ptr + m[:, None] * steps + start // STEP
            fine = fine_ptr + m[:, None] * STEP + k[None, :] % STEP
        cc, ct = tl.load(coarse, mask=ok, other=0.0), tl.load(coarse + bins * steps, mask=ok, other=0.0)
        fc, ft = tl.load(fine, mask=ok, other=0.0), tl.load(fine + bins * STEP, mask=ok, other=0.0)
        c += tl.dot(cc * fc - ct * ft, x, input_precision=PRECISION)  # added outside the tensor cores, see `_dot`
        s += tl.dot(cc * ft + ct * fc, x, input_precision=PRECISION)
    cr, ci = c.reshape(BM, BN // 2, 2).split()
    sr, si = s.reshape(BM, BN // 2, 2).split()
    if BACK:
        re, im = cr + si, ci - sr
    else:
        half = tl.program_id(0) % columns * (BN // 2) + tl.arange(0, BN // 2)
        f = tl.load(factor_ptr + m[:, None] * (N // 2) + half[None, :],
                    mask=(m[:, None] < M) & (2 * half[None, :] < N), other=0.0)  # fmt: skip
        re, im = (cr - si) * f, (ci + sr) * f
    to = batch if BACK else batch * parts + part
    place = out_ptr + to * M * N + m[:, None] * N + n[None, :]
    tl.store(place, tl.join(re, im).reshape(BM, BN), mask=(m[:, None] < M) & (n[None, :] < N))

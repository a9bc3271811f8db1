"""highpass_filter: remove the low frequencies of every matrix of a batch, in one of two forms that are both exact.

Story. The filter's result is x minus its removed part, and the usual masks remove few frequencies.

*pruned*: the removed part is a product with thin matrices of cosines and sines. With the C removed columns of the half
spectrum, E [W, 2C] holds cos and −sin of 2πcw/W; P = x E is the transform along the rows on those columns alone, a small
complex product along the other axis applies the gains 1 − g, and ``out = x − D Eᵀ``. The shorter axis is contracted first.
x is read twice and written once, the rest is thin; the work is 8·C·H·W flops in `tl.dot`, three TF32 products each.

*fft*: torch.fft makes the transforms; a kernel before it forms the (weighted) delta in the compute dtype, one between
applies the gains from the integer bounds, one after it adds the base, casts and marks matrices that held a NaN or an Inf.

`form` chooses by counting flops and bytes, see there. Either can take the delta Σ wᵢ (modelᵢ − base) instead of x, and add
the base at the end, so that a whole merge needs no other pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._jit import (
    INTERPRETING,
    bits,
    jit,
    launch,
    narrow,
    target,
    tl,
    tl_dtype,
    triton,
    upload,
    warps,
    wide_dtype,
)
from ._staged import one_tile, three_launches
from ._stages import TILE, _delta, _load, flops, shape

FLOPS_PER_BYTE = 49  # an H100's 3xTF32 flops for each byte its memory moves: 495e12 / 3 / 3.35e12 (data sheet)
_FFT_BYTES = 56  # moved for each element by the fft form: 14 passes of 4 bytes (first, 2 x 4 transform, 2 mask, last)
_GRID = 65535  # matrices a launch takes: the limit of a grid's third dimension
_STAGED_SLOWER = 2  # small products, operands rearranged between them: assumed to run at half the rate of long ones,
_THREE_STAGES_SLOWER = 8 / 3  # and at three eighths of it where registers leave room for 8 warps only
_PRUNED_BYTES = 12  # by the pruned form: x twice, out once


class Mask(Protocol):
    """fastmerge.ops._spectral_mask.SpectralMask."""

    height: int
    width: int
    bounds: Tensor
    ring: Tensor
    columns: Tensor

    @property
    def rows(self) -> Tensor: ...

    def gain(self) -> Tensor: ...


class Form(NamedTuple):
    name: str  # "pruned", "staged" or "fft"
    why: str


def form(mask: Mask, compute: torch.dtype) -> Form:
    """The form with the smallest estimate, flops / FLOPS_PER_BYTE + bytes for each element of x (`costs`).

    A matrix that fits a tile (32 x 32) is staged: one launch. docs/gpu.md has the crossovers.
    """
    if compute == torch.float64:
        return Form("fft", "float64 goes through torch.fft")
    if max(mask.height, mask.width) <= TILE:
        return Form("staged", f"{mask.height} x {mask.width} fits in a tile: one launch")
    thin, length = _thin(_Key(mask))
    estimate = costs(mask)
    name = min(estimate, key=lambda n: estimate[n])
    each = ", ".join(f"{n} {c:.0f}" for n, c in estimate.items())
    return Form(name, f"{thin} frequencies of {length} removed: {each} bytes' time an element")


def costs(mask: Mask) -> dict[str, float]:
    """Each possible form's estimate, in the time in which memory moves a byte, for each element of x."""
    thin, length = _thin(_Key(mask))
    found = {
        "pruned": 8 * thin / FLOPS_PER_BYTE + _PRUNED_BYTES + 64 * thin / length
    }  # the thin panel's own transforms
    plan = shape(mask.height, mask.width, int(mask.columns[-1]))
    if plan is not None:
        data = (8 if plan.keep else 12) + 16 * plan.share
        slower = _THREE_STAGES_SLOWER if max(plan.rows.n3, plan.tall.n3) > 1 else _STAGED_SLOWER
        found["staged"] = data + slower * flops(plan, mask.rows) / FLOPS_PER_BYTE
    return found | {"fft": _FFT_BYTES}


class _Key:
    """A mask as a dictionary key, by identity: the masks are cached objects themselves."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def __hash__(self) -> int:
        return id(self.mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.mask is self.mask


@functools.lru_cache(maxsize=256)
def _thin(key: _Key) -> tuple[int, int]:
    """(removed frequencies of the axis contracted first, its length)."""
    mask = key.mask
    if mask.height < mask.width:
        rows = (mask.gain()[:, mask.columns.long()] != 1).any(1).nonzero()[:, 0]
        return int(torch.minimum(rows, mask.height - rows).unique().numel()), mask.height
    return len(mask.columns), mask.width


def _removed(key: _Key) -> Tensor:
    """float64 [H, W]: 1 − the gain that a real result sees on the whole plane; bin (-r, -c) mirrors (r, c)."""
    height, width, gain = key.mask.height, key.mask.width, key.mask.gain()
    half = width // 2 + 1
    whole = torch.zeros(height, width, dtype=torch.float64)
    whole[:, :half] = gain
    mirror = (-torch.arange(height)) % height
    whole[:, half:] = gain[mirror][:, (-torch.arange(half, width)) % width]
    for c in {0, width // 2} if width % 2 == 0 else {0}:  # columns that are their own mirror: the mean of both
        whole[:, c] = (gain[:, c] + gain[mirror, c]) / 2
    return 1.0 - whole


# ---------------------------------------------------------------------------------------------------------- kernels


@jit(do_not_specialize=["weights"])
def project_kernel(
    base_ptr, model_ptrs, weights, basis_ptr, out_ptr, bad_ptr, M, K, N, stride_m, stride_k, size,
    HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[M, N] = delta[M, K] · basis[K, N], of every matrix of the batch; notes matrices that hold a NaN or an Inf."""
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    odd = tl.zeros((BM, BK), tl.int32)
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)
        ok = (m[:, None] < M) & (k[None, :] < K)
        at = batch * size + m[:, None].to(tl.int64) * stride_m + k[None, :].to(tl.int64) * stride_k
        x = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32)
        odd = odd | ((x - x) != 0).to(tl.int32)
        e = tl.load(basis_ptr + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        total = tl.dot(x, e, total, input_precision=PRECISION)
    place = out_ptr + batch * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(place, total, mask=(m[:, None] < M) & (n[None, :] < N))
    if tl.max(tl.max(odd, 1), 0) > 0:
        tl.atomic_max(bad_ptr + batch, 1)


@jit(do_not_specialize=["weights"])
def subtract_kernel(
    base_ptr, model_ptrs, weights, thin_ptr, basis_ptr, bad_ptr, out_ptr, M, K, N, stride_m, stride_n, size,
    HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, ADD_BASE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = (base +) delta − thin[M, K] · basis[N, K]ᵀ."""
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    low = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)
        d = tl.load(thin_ptr + batch * M * K + m[:, None].to(tl.int64) * K + k[None, :],
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        e = tl.load(basis_ptr + n[None, :] * K + k[:, None], mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        low = tl.dot(d, e, low, input_precision=PRECISION)
    ok = (m[:, None] < M) & (n[None, :] < N)
    at = batch * size + m[:, None].to(tl.int64) * stride_m + n[None, :].to(tl.int64) * stride_n
    y = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32) - low
    y = tl.where(tl.load(bad_ptr + batch) != 0, float("nan"), y)
    if ADD_BASE:
        y = tl.load(base_ptr + at, mask=ok, other=0.0).to(tl.float32) + y
    tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask=ok)


@jit(do_not_specialize=["weights"])
def delta_kernel(base_ptr, model_ptrs, weights, out_ptr, n, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Before the transform: the delta in the compute dtype."""
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
    spectrum_ptr, low_ptr, high_ptr, rows, height, half, share, TABLES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Between the transforms: every bin times (tables whose interval of its row holds its column) / tables."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # real and imaginary parts in turn
    column = at // 2
    count = tl.zeros((ROWS, BLOCK), tl.int32)
    for t in tl.static_range(TABLES):
        low = tl.load(low_ptr + t * height + row % height)
        high = tl.load(high_ptr + t * height + row % height)
        count += ((column[None, :] >= low[:, None]) & (column[None, :] < high[:, None])).to(tl.int32)
    ok = (row[:, None] < rows) & (column[None, :] < half)
    place = spectrum_ptr + row[:, None] * (2 * half) + at[None, :]
    value = tl.load(place, mask=ok, other=0.0)
    tl.store(place, tl.where(count == TABLES, value, value * count.to(value.dtype) * share), mask=ok)


@jit
def _finish_block(value_ptr, base_ptr, bad_ptr, out_ptr, at, ok, size, ADD_BASE: tl.constexpr, COMPUTE: tl.constexpr):
    y = _load(value_ptr + at, ok)
    y = tl.where(_load(bad_ptr + at // size, ok) != 0, float("nan"), y)
    if ADD_BASE:
        y = _load(base_ptr + at, ok).to(COMPUTE) + y
    tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask=ok)


@jit
def finish_kernel(value_ptr, base_ptr, bad_ptr, out_ptr, n, size, ADD_BASE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """After the transform: base, cast, and NaN for the matrices that held one."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _finish_block(value_ptr, base_ptr, bad_ptr, out_ptr, at, None, size, ADD_BASE, COMPUTE)
    else:
        _finish_block(value_ptr, base_ptr, bad_ptr, out_ptr, at, at < n, size, ADD_BASE, COMPUTE)


# --------------------------------------------------------------------------------------------------------- launcher


def highpass_filter(
    models: Sequence[Tensor],
    out: Tensor,
    mask: Mask,
    *,
    base: Tensor | None = None,
    weights: Sequence[float] | None = None,
    add_base: bool = False,
    which: str | None = None,
    tf32: bool = False,
) -> Tensor:
    """Fills `out` [..., H, W] with the filtered models[0], or with (base +) the filtered Σ wᵢ (modelᵢ − base).

    Models and out are contiguous tensors of one shape; `which` overrules the choice of form; `tf32` gives up accuracy
    (about 1e-3 of x) for one product instead of three.
    """
    compute = wide_dtype(base, *models)
    batch = out.numel() // (mask.height * mask.width)
    source = (
        models[0] if base is None else base,
        tuple(models),
        tuple(bits(w, compute) for w in (weights or [1.0])),
    )
    flags = {"HAS_BASE": base is not None, "WEIGHTED": weights is not None}
    run = {"pruned": _pruned, "staged": _staged, "fft": _through_fft}[which or form(mask, compute).name]
    for begin in range(0, batch, _GRID):
        end = min(batch, begin + _GRID)
        if end - begin < batch:
            parts = [t.view(batch, mask.height, mask.width)[begin:end] for t in (source[0], *source[1], out)]
            run((parts[0], tuple(parts[1:-1]), source[2]), flags, parts[-1], mask, end - begin, compute, add_base, tf32)
        else:
            run(source, flags, out, mask, batch, compute, add_base, tf32)
    return out


def _pruned(source, flags, out, mask, batch, compute, add_base, tf32):  # type: ignore[no-untyped-def]
    height, width, device = mask.height, mask.width, out.device
    over_rows = height < width  # contract the shorter axis first
    basis, factor = _bases(_Key(mask), over_rows, device)
    m, k, stride_m, stride_k = (width, height, 1, width) if over_rows else (height, width, width, 1)
    n = basis.shape[1]
    thin = torch.empty(batch, m, n, dtype=torch.float32, device=device)
    bad = torch.zeros(batch, dtype=torch.int32, device=device)
    precision = _precision(tf32)
    tile = {"BM": 128, "BN": 128, "BK": 128} if INTERPRETING else {"BM": 64, "BN": 64, "BK": 32}
    launch(
        project_kernel, (triton.cdiv(n, tile["BN"]), triton.cdiv(m, tile["BM"]), batch),
        *source, basis, thin, bad, m, k, n, stride_m, stride_k, height * width,
        PRECISION=precision, num_warps=warps(8), device=device, **flags, **tile,
    )  # fmt: skip
    bins = torch.fft.fft(torch.view_as_complex(thin.view(batch, m, n // 2, 2)), dim=1)
    low = torch.view_as_real(torch.fft.ifft(bins * factor, dim=1)).contiguous()
    launch(
        subtract_kernel, (triton.cdiv(k, tile["BN"]), triton.cdiv(m, tile["BM"]), batch),
        *source, low, basis, bad, out, m, n, k, stride_m, stride_k, height * width,
        ADD_BASE=add_base, PRECISION=precision, num_warps=warps(8), device=device, **flags, **tile,
    )  # fmt: skip


@functools.lru_cache(maxsize=32)
def _bases(key: _Key, over_rows: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(basis [K, 2C] of cos and −sin along the axis contracted first, factors [M, C] of the bins to subtract)."""
    removed = _removed(key)
    removed = removed.T if over_rows else removed  # [M, K]
    k = removed.shape[1]
    first = (removed[:, : k // 2 + 1] != 0).any(0).nonzero()[:, 0]
    angle = 2 * math.pi * ((torch.arange(k)[:, None] * first) % k).double() / k
    basis = torch.stack([angle.cos(), -angle.sin()], 2).reshape(k, -1).float()
    twice = torch.where((first == 0) | (2 * first == k), 1.0, 2.0)  # a bin and its mirror
    factor = (removed[:, first] * twice / k).float()
    more = -len(first) % 8  # columns of zeros, so that rows of the thin matrices start at multiples of 64 bytes
    pad = torch.nn.functional.pad
    return pad(basis, (0, 2 * more)).to(device), pad(factor, (0, more)).to(device)


def _staged(source, flags, out, mask, batch, _compute, add_base, tf32):  # type: ignore[no-untyped-def]
    run = one_tile if max(mask.height, mask.width) <= TILE else three_launches
    run(source, flags, out, mask, batch, add_base, _precision(tf32))


def _precision(tf32: bool) -> str:
    return "ieee" if INTERPRETING or target().backend != "cuda" else "tf32" if tf32 else "tf32x3"


def _through_fft(source, flags, out, mask, batch, compute, add_base, _tf32):  # type: ignore[no-untyped-def]
    height, width, device = mask.height, mask.width, out.device
    n, half, tables = out.numel(), width // 2 + 1, mask.bounds.shape[0]
    block = 1 << 16 if INTERPRETING else 1024
    value = torch.empty(batch, height, width, dtype=compute, device=device)
    launch(delta_kernel, (triton.cdiv(n, block),), *source, value, n, COMPUTE=tl_dtype(compute), BLOCK=block,
           device=device, **flags)  # fmt: skip
    spectrum = torch.fft.rfft2(value)
    bad = (~torch.view_as_real(spectrum[:, 0, 0]).isfinite().all(-1)).to(torch.int32)  # the sum of all elements
    low, high = (upload(mask.bounds[..., i].contiguous(), torch.int32, device) for i in (0, 1))
    ring = mask.ring.long()
    bins = spectrum.view(batch, -1)
    where = upload(ring[:, 0] * half + ring[:, 1], torch.int64, device)
    raised = bins[:, where] / tables
    rows, tile = (1024, 128) if INTERPRETING else (4, 256)
    launch(
        gain_kernel, (triton.cdiv(batch * height, rows), triton.cdiv(2 * half, tile)), torch.view_as_real(spectrum),
        low, high, batch * height, height, half, 1.0 / tables, TABLES=tables, ROWS=rows, BLOCK=tile, device=device,
    )  # fmt: skip
    if len(ring):
        bins.index_add_(1, where, raised)
    value = torch.fft.irfft2(spectrum, s=(height, width))
    launch(finish_kernel, (triton.cdiv(n, block),), value, source[0], bad, out, n, height * width,
           ADD_BASE=add_base, COMPUTE=tl_dtype(compute), BLOCK=block, device=device)  # fmt: skip

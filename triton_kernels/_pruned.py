"""highpass_filter's pruned form: out = x − D Eᵀ, what is removed as a product of thin matrices (story: highpass_filter.py).

Three steps: P = x E, transforms along the rows on the few removed columns; the transform of P along the other axis, the
gains and the way back; x − D Eᵀ. The second step is torch.fft for large matrices. For small ones (`turns`) it is two more
products, since few of that axis' bins are removed either: two launches for any number of matrices, and the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ._jit import INTERPRETING, jit, launch, narrow, target, tl, triton, warps
from ._stages import _delta, _inputs, _listed

SMALL = 1 << 20  # elements: what may come with others (fastmerge/_dispatch.py)
TURN = {"BM": 16, "BN": 32, "BK": 64}  # tiles of `turn_kernel`
PART = 256  # rows of a part, about, see `turn_kernel`
STEP = 128  # rows, see `turn_kernel`: a multiple of its tiles
TURNS = 1 << 24  # products of a panel and roots up to which they are no slower than torch.fft


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


class Key:
    """A mask as a dictionary key, by identity: the masks are cached objects themselves."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def __hash__(self) -> int:
        return id(self.mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and other.mask is self.mask


@functools.lru_cache(maxsize=64)
def mask_tables(key: Key, device: torch.device) -> tuple[Tensor, Tensor]:
    """The mask's bounds [T, H, 2] and ring [R, 2], int32, on the device: copied once, so that calls need no copy (and a
    captured graph none that would read host memory again)."""
    return key.mask.bounds.to(device), key.mask.ring.to(device)


@functools.lru_cache(maxsize=256)
def thin_axis(key: Key) -> tuple[int, int]:
    """(removed frequencies of the axis contracted first, its length)."""
    mask = key.mask
    if mask.height < mask.width:
        rows = (mask.gain()[:, mask.columns.long()] != 1).any(1).nonzero()[:, 0]
        return int(torch.minimum(rows, mask.height - rows).unique().numel()), mask.height
    return len(mask.columns), mask.width


def _removed(key: Key) -> Tensor:
    """float64 [H, W]: 1 − the gain that a real result sees on the whole plane; bin (-r, -c) mirrors (r, c)."""
    height, width, gain = key.mask.height, key.mask.width, key.mask.gain()
    half = width // 2 + 1
    whole = gain.new_zeros(height, width, dtype=torch.float64)
    whole[:, :half] = gain
    mirror = (-torch.arange(height, device=gain.device)) % height
    whole[:, half:] = gain[mirror][:, (-torch.arange(half, width, device=gain.device)) % width]
    for c in {0, width // 2} if width % 2 == 0 else {0}:  # columns that are their own mirror: the mean of both
        whole[:, c] = (gain[:, c] + gain[mirror, c]) / 2
    return 1.0 - whole


# ---------------------------------------------------------------------------------------------------------- kernels


@jit(do_not_specialize=["weights"])
def project_kernel(
    base_ptr, model_ptrs, weights, basis_ptr, out_ptr, bad_ptr, M, K, N, stride_m, stride_k, size,
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[M, N] = delta[M, K] · basis[K, N], of every matrix of the batch; notes matrices that hold a NaN or an Inf."""
    batch = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    odd = tl.zeros((BM, BK), tl.int32)
    first, base_ptr, model_ptrs, weights = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)
        ok = (m[:, None] < M) & (k[None, :] < K)
        at = first * size + m[:, None].to(tl.int64) * stride_m + k[None, :].to(tl.int64) * stride_k
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
    table_ptr, ALIGN: tl.constexpr, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, ADD_BASE: tl.constexpr, PRECISION: tl.constexpr,
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
    first, base_ptr, model_ptrs, weights = _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN)
    out_ptr = _listed(table_ptr, batch, 0, len(model_ptrs), out_ptr, ALIGN)
    at = first * size + m[:, None].to(tl.int64) * stride_m + n[None, :].to(tl.int64) * stride_n
    y = _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE, WEIGHTED, tl.float32) - low
    y = tl.where(tl.load(bad_ptr + batch) != 0, float("nan"), y)
    if ADD_BASE:
        y = tl.load(base_ptr + at, mask=ok, other=0.0).to(tl.float32) + y
    tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask=ok)


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
        c = tl.dot(cc * fc - ct * ft, x, c, input_precision=PRECISION)
        s = tl.dot(cc * ft + ct * fc, x, s, input_precision=PRECISION)
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


# --------------------------------------------------------------------------------------------------------- launcher


def transformed(transform: Callable[[Tensor], Tensor], x: Tensor, flags: dict[str, Any]) -> Tensor:
    """`transform` of a batch; of matrices from a table one after another, see `highpass_filter_many`."""
    if flags["table_ptr"] is None or len(x) == 1:
        return transform(x)
    return torch.cat([transform(one) for one in x.split(1)])


def products(tf32: bool) -> str:
    return "ieee" if INTERPRETING or target().backend != "cuda" else "tf32" if tf32 else "tf32x3"


def pruned(source, flags, out, mask, batch, compute, add_base, tf32):  # type: ignore[no-untyped-def]
    height, width, device = mask.height, mask.width, out.device
    over_rows = height < width  # contract the shorter axis first
    basis, factor = _bases(Key(mask), over_rows, device)
    m, k, stride_m, stride_k = (width, height, 1, width) if over_rows else (height, width, width, 1)
    n = basis.shape[1]
    thin = torch.empty(batch, m, n, dtype=torch.float32, device=device)
    bad = torch.zeros(batch, dtype=torch.int32, device=device)
    precision = products(tf32)
    tile = {"BM": 128, "BN": 128, "BK": 128} if INTERPRETING else {"BM": 64, "BN": 64, "BK": 32}
    always = {"PRECISION": precision, "num_warps": warps(8), "device": device, **tile}
    launch(
        project_kernel, (triton.cdiv(n, tile["BN"]), triton.cdiv(m, tile["BM"]), batch),
        *source, basis, thin, bad, m, k, n, stride_m, stride_k, height * width, **always, **flags,
    )  # fmt: skip
    if turns(mask):
        coarse, fine, of_bins = _roots(Key(mask), over_rows, device)
        r, steps = coarse.shape[1:]
        turn = always | {"STEP": STEP}
        if not INTERPRETING:
            turn |= TURN | {"num_warps": warps(4)}
        parts = max(1, min(m // r, triton.cdiv(m, PART)))  # no more memory than `thin` has
        rows = triton.cdiv(m, parts * STEP) * STEP
        parts = triton.cdiv(m, rows)
        columns, low = triton.cdiv(n, turn["BN"]), torch.empty(batch, parts, r, n, dtype=torch.float32, device=device)
        common = (coarse, fine, of_bins)
        launch(turn_kernel, (columns * parts, triton.cdiv(r, turn["BM"]), batch), thin, *common, low, r, m, n, r, steps,
               parts, rows, BACK=False, **turn)  # fmt: skip
        launch(turn_kernel, (columns, triton.cdiv(m, turn["BM"]), batch), low, *common, thin, m, r, n, r, steps,
               parts, rows, BACK=True, **turn)  # fmt: skip
    else:
        bins = torch.view_as_complex(thin.view(batch, m, n // 2, 2))
        bins = transformed(lambda b: torch.fft.ifft(torch.fft.fft(b, dim=1) * factor, dim=1), bins, flags)
        thin = torch.view_as_real(bins).contiguous()
    launch(
        subtract_kernel, (triton.cdiv(k, tile["BN"]), triton.cdiv(m, tile["BM"]), batch),
        *source, thin, basis, bad, out, m, n, k, stride_m, stride_k, height * width, ADD_BASE=add_base, **always, **flags,
    )  # fmt: skip


@functools.lru_cache(maxsize=32)
def _bases(key: Key, over_rows: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(basis [K, 2C] of cos and −sin along the axis contracted first, factors [M, C] of the bins to subtract)."""
    removed = _removed(key)
    removed = removed.T if over_rows else removed  # [M, K]
    k = removed.shape[1]
    first = (removed[:, : k // 2 + 1] != 0).any(0).nonzero()[:, 0]
    angle = 2 * math.pi * ((torch.arange(k, device=first.device)[:, None] * first) % k).double() / k
    basis = torch.stack([angle.cos(), -angle.sin()], 2).reshape(k, -1).float()
    twice = torch.where((first == 0) | (2 * first == k), 1.0, 2.0)  # a bin and its mirror
    factor = (removed[:, first] * twice / k).float()
    # Columns of zeros, so that rows of the thin matrices start at multiples of 64 bytes; not so many that they are wide.
    more = -len(first) % max(1, min(8, k // 2))
    pad = torch.nn.functional.pad
    return pad(basis, (0, 2 * more)).to(device), pad(factor, (0, more)).to(device)


def turns(mask: Mask) -> bool:
    """Whether the thin panel's transforms are products with the roots of the few bins: for small matrices.

    For them torch.fft is mostly launches, and its bits depend on how many matrices there are.
    """
    return mask.height * mask.width <= SMALL and _turn_products(Key(mask)) <= TURNS


@functools.lru_cache(maxsize=256)
def _turn_products(key: Key) -> int:
    """Rows x bins x columns of the panel, those of a tile at least."""
    removed = _removed(key)
    removed = removed.T if key.mask.height < key.mask.width else removed
    return len(removed) * int((removed != 0).any(1).sum()) * max(TURN["BN"], 2 * thin_axis(key)[0])


@functools.lru_cache(maxsize=32)
def _roots(key: Key, over_rows: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """cos and −sin of 2π rm/M for the R bins to remove along the axis contracted last, [2, R, M / STEP] for m that are
    multiples of STEP, [2, R, STEP] for m below it; and the factors [R, C].
    """  # fmt: skip
    factor = _bases(key, over_rows, torch.device("cpu"))[1]  # [M, C]
    m = len(factor)
    bins = (factor != 0).any(1).nonzero()[:, 0]

    def roots(of: Tensor) -> Tensor:
        angle = 2 * math.pi * ((bins[:, None] * of) % m).double() / m
        return torch.stack([angle.cos(), -angle.sin()]).float().to(device)

    scaled = (factor[bins].double() / m).float().to(device)
    return roots(torch.arange(0, m, STEP, device=bins.device)), roots(torch.arange(STEP, device=bins.device)), scaled

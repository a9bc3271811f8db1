"""What the staged form of highpass_filter is made of: lengths as stages, the layout of a spectrum, tables, device code.

A transform of length n = n1·n2 is two stages of products with small matrices of roots of unity, and a product with
twiddles between them: with j = j1·n2 + j2 and k = k1 + n1·k2, jk/n = j1·k1/n1 + j2·k1/n + j2·k2/n2. The matrices are at
most 32 wide and may have any size up to that: they are padded to 16 or 32, so a radix need not be prime or even. Every
other length goes through torch.fft: two stages of 64 spill on every GPU, and three of 16 (up to 4096) were written,
compiled without spills and measured: 570 to 720 microseconds for 4096 x 4096 on an H100, torch.fft's form 390.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._jit import jit, narrow, scalar, tl, upload

RADIX = 32  # largest stage
TILE = 32  # largest matrix of one tile


class Stages(NamedTuple):
    """n = n1 · n2."""

    n1: int
    n2: int

    @property
    def padded(self) -> tuple[int, int]:
        """What each stage is padded to."""
        return padded(self.n1), padded(self.n2)


def padded(n: int) -> int:
    """The power of two that a stage of n is padded to; `tl.dot` needs 16."""
    return 1 << max(4, (n - 1).bit_length())


@functools.lru_cache(maxsize=256)
def stages(n: int) -> Stages | None:
    """The stages of a transform of length n with the least padding; None where it has none."""
    two = [Stages(n // b, b) for b in range(1, RADIX + 1) if n % b == 0 and n // b <= RADIX]
    return min(two, key=lambda s: (s.padded[0] * s.padded[1], s.padded[0], s.n1), default=None)


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
    (p1, p2), q = s.rows.padded, padded(s.blocks)
    rows = 2 * (4 * p1 + 8 * q) * (p1 * p2 / (s.rows.n1 * s.rows.n2))
    columns = 16 * sum(s.tall.padded) * math.prod(s.tall.padded) / math.prod(s.tall)
    return rows + columns * s.share


# ------------------------------------------------------------------------------------------------------ device code


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
def _factor(bounds_ptr, ring_ptr, rings, ky, kx, height, width, keep, TABLES: tl.constexpr):
    """1 − gain (keep: the gain) of bins from the integer bounds, times what a bin and its mirror weigh."""
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
    count = tl.where(keep != 0, count, TABLES - count)
    twice = tl.where((kx == 0) | (2 * kx == width), 1, 2)
    return tl.where(ok, count * twice, 0).to(tl.float32)


@jit
def _load(ptrs, ok):
    """Elements, 0 where not `ok`; None: all of them, and then the loads are wide."""
    return tl.load(ptrs, mask=ok, other=None if ok is None else 0.0)


@jit
def _listed(table_ptr, batch, column: tl.constexpr, K: tl.constexpr, ptr, ALIGN: tl.constexpr):
    """`ptr`, or, with a table, the address of its type that is in the row of matrix `batch`.

    A row: out, base, K models, K weights. ALIGN: what divides all addresses.
    """
    if table_ptr is None:
        return ptr
    else:
        return tl.multiple_of(tl.load(table_ptr + batch * (2 * K + 2) + column).to(ptr.dtype), ALIGN)


@jit
def _inputs(table_ptr, batch, base_ptr, model_ptrs, weights, ALIGN: tl.constexpr):
    """(number among the matrices, base, models, weights) of matrix `batch`: what was given, or, with a table, its row."""
    if table_ptr is None:
        return batch, base_ptr, model_ptrs, weights
    else:
        K: tl.constexpr = len(model_ptrs)
        models = (_listed(table_ptr, batch, 2, K, model_ptrs[0], ALIGN),)
        scalars = (tl.load(table_ptr + batch * (2 * K + 2) + 2 + K),)
        for k in tl.static_range(1, K):
            models = models + (_listed(table_ptr, batch, 2 + k, K, model_ptrs[k], ALIGN),)  # noqa: RUF005 (Triton unpacks none)
            scalars = scalars + (tl.load(table_ptr + batch * (2 * K + 2) + 2 + K + k),)  # noqa: RUF005
        return batch * 0, _listed(table_ptr, batch, 1, K, base_ptr, ALIGN), models, scalars


@jit
def _delta(base_ptr, model_ptrs, weights, at, ok, HAS_BASE: tl.constexpr, WEIGHTED: tl.constexpr, COMPUTE: tl.constexpr, start=0):  # fmt: skip
    """Σ wᵢ (modelᵢ − base) of the elements start + at, or the one model as it is."""
    x = _load(model_ptrs[0] + start + at, ok).to(COMPUTE)
    if HAS_BASE:
        base = _load(base_ptr + start + at, ok).to(COMPUTE)
        x = x - base
    if WEIGHTED:
        x = x * scalar(weights[0], COMPUTE)
        for k in tl.static_range(1, len(model_ptrs)):
            y = _load(model_ptrs[k] + start + at, ok).to(COMPUTE)
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


# ----------------------------------------------------------------------------------------------------------- tables


@functools.lru_cache(maxsize=64)
def matrix(n: int, p: int, device: torch.device) -> Tensor:
    """float32 [2, p, p]: cos and −sin of 2π jk/n for j, k < n, zeros around."""
    return table(n, n, n, p, p, device)


@functools.lru_cache(maxsize=64)
def twiddles(s: Stages, device: torch.device) -> Tensor:
    """float32 [2, p1, p2] of 2π k1·j2 / (n1·n2): between two stages."""
    return table(s.n1, s.n2, s.n1 * s.n2, padded(s.n1), padded(s.n2), device)


def table(rows: int, columns: int, n: int, p: int, q: int, device: torch.device) -> Tensor:
    """float32 [2, p, q]: cos and −sin of 2π jk/n for j < rows, k < columns, zeros around."""
    j, k = torch.arange(rows, device="cpu")[:, None], torch.arange(columns, device="cpu")
    angle = 2 * math.pi * ((j * k) % n).double() / n
    made = torch.zeros(2, p, q, device="cpu")
    made[0, :rows, :columns] = angle.cos()
    made[1, :rows, :columns] = -angle.sin()
    return upload(made, torch.float32, device)

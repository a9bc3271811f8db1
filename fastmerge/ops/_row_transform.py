"""Tables of the CPU's row transforms (csrc/common/row_fft.h, which has the formulas): real rows to a few columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LARGEST_RADIX = 61  # of a prime factor, mirrored in row_fft.h: larger ones are left to torch's transforms
SHORTEST = 16  # elements of a row


@dataclass(frozen=True)
class RowTransform:
    """One width and one list of columns; `arguments` are what the kernels take."""

    width: int
    split: int
    factors: tuple[int, ...]
    order: Tensor
    columns: Tensor
    tables: Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (
            self.width, self.split, list(self.factors), self.order.data_ptr(),
            self.columns.data_ptr(), len(self.columns), self.tables.data_ptr(),
        )  # fmt: skip


def _factors(n: int) -> tuple[int, ...] | None:
    """Radices whose product is n, fours first; None where a prime factor is too large."""
    found = []
    for radix in (4, 2, *range(3, LARGEST_RADIX + 1, 2)):  # an odd composite divides nothing when its primes are out
        while n % radix == 0:
            found.append(radix)
            n //= radix
    return tuple(found) if n == 1 else None


def _order(factors: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """The input point of each place for transforms in place, decimated in time."""
    order = np.zeros(1, np.int64)
    for f in factors:
        order = np.concatenate([q + f * order for q in range(f)])
    return order.astype(np.int32)


def _roots(numerator: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.complex128]:
    """exp(-2 pi i numerator / n), the fraction being reduced first."""
    return np.exp(-2j * np.pi * (numerator % n) / n)


def row_transform(width: int, columns: Tensor, dtype: torch.dtype) -> RowTransform | None:
    """The tables for float32 or float64 rows, or None for an odd or short width or one with a large prime factor."""
    if width % 2 or width < SHORTEST:
        return None
    half, wanted = width // 2, columns.numpy().astype(np.int64)
    factors = _factors(half)
    if factors is None:
        return None
    split = _split(half, factors, len(wanted))
    factors = _factors(half // split) or ()
    stages, length = [], 1
    for f in factors:
        stages.append(_roots(np.arange(f), f))
        stages.append(_roots(np.arange(length)[:, None] * np.arange(1, f), length * f).reshape(-1))
        length *= f
    turn, back = _roots(np.arange(split)[:, None] * wanted, half), 1j * _roots(wanted, width)
    a, b = turn * (1 - back) / 2, turn * (1 + back) / 2  # [R, C]
    c, d = a.conj() / half, b.conj() / half
    c[:, wanted == half], d[:, wanted == 0] = 0, 0
    parts = [*stages, np.stack([a, b], -1).reshape(-1), np.stack([c, d], -1).reshape(-1)]
    tables = torch.from_numpy(np.concatenate(parts).view(np.float64)).to(dtype)
    return RowTransform(width, split, factors, torch.from_numpy(_order(factors)), columns, tables)


def _split(half: int, factors: tuple[int, ...], count: int) -> int:
    """R: into how many transforms a row's points are divided, by the work that is left: about 4 operations of a stage
    for every point and bit, 16 for every wanted column of each transform."""

    def work(split: int) -> float:
        left = _factors(half // split) or ()
        return half * sum(_WORK.get(f, 2.0 * f + 8) for f in left) + 16.0 * split * count

    return min((s for s in (1, 2, 3, 4, 5, 6, 8, 16) if half % s == 0 and half // s >= 4), key=work, default=1)


_WORK = {2: 7.0, 3: 12.0, 4: 9.0, 5: 17.0}  # vector operations a point of a stage, its loads and stores among them

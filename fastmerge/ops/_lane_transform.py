"""Tables of the CPU's Fourier transforms (csrc/common/lane_fft.h, which has the formulas): a few frequencies of many
rows, or of many columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LARGEST_RADIX = 257  # of a prime factor, mirrored in lane_fft.h: larger ones are left to torch's transforms
SHORTEST = 16  # elements of a row


@dataclass(frozen=True, eq=False)
class LaneTransform:
    """One length and one list of frequencies."""

    points: int  # of each of `split` transforms
    split: int
    factors: tuple[int, ...]
    order: Tensor
    wanted: Tensor
    tables: Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the kernels take."""
        return (
            self.split, list(self.factors), self.order.data_ptr(),
            self.wanted.data_ptr(), len(self.wanted), self.tables.data_ptr(),
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
    roots: npt.NDArray[np.complex128] = np.exp(-2j * np.pi * (numerator % n) / n)
    return roots


def _stages(factors: tuple[int, ...]) -> list[npt.NDArray[np.complex128]]:
    """Roots and twiddles of every stage."""
    stages, length = [], 1
    for f in factors:
        stages.append(_roots(np.arange(f), f))
        stages.append(_roots(np.arange(length)[:, None] * np.arange(1, f), length * f).reshape(-1))
        length *= f
    return stages


def row_transform(width: int, columns: Tensor, dtype: torch.dtype) -> LaneTransform | None:
    """For real rows of float32 or float64 and int32 columns of their half spectrum; None for an odd or short width or
    one with a large prime factor."""
    if width % 2 or width < SHORTEST or _factors(width // 2) is None:
        return None
    half, wanted = width // 2, columns.numpy().astype(np.int64)
    split = _split(half, 16.0 * len(wanted))
    factors = _factors(half // split) or ()
    turn, back = _roots(np.arange(split)[:, None] * wanted, half), 1j * _roots(wanted, width)
    a, b = turn * (1 - back) / 2, turn * (1 + back) / 2  # [R, C]
    c, d = a.conj() / half, b.conj() / half
    c[:, wanted == half], d[:, wanted == 0] = 0, 0
    tables = [*_stages(factors), np.stack([a, b], -1).reshape(-1), np.stack([c, d], -1).reshape(-1)]
    return _made(half // split, split, factors, columns, tables, dtype)


def column_transform(height: int, rows: Tensor, dtype: torch.dtype) -> LaneTransform | None:
    """For complex columns and int32 rows of their spectrum; None for a height with a large prime factor."""
    if height < 2 or _factors(height) is None:
        return None
    wanted = rows.numpy().astype(np.int64)
    split = _split(height, 8.0 * len(wanted))
    factors = _factors(height // split) or ()
    turn = _roots(np.arange(split)[:, None] * wanted, height).reshape(-1)
    return _made(height // split, split, factors, rows, [*_stages(factors), turn, turn.conj() / height], dtype)


def _made(
    points: int,
    split: int,
    factors: tuple[int, ...],
    wanted: Tensor,
    tables: list[npt.NDArray[np.complex128]],
    dtype: torch.dtype,
) -> LaneTransform:
    numbers = torch.from_numpy(np.concatenate(tables).view(np.float64)).to(dtype)
    return LaneTransform(points, split, factors, torch.from_numpy(_order(factors)), wanted, numbers)


def _split(length: int, each: float) -> int:
    """Into how many transforms a row's points are divided, by the vector operations that are left: those of the stages
    for every point, and `each` of every one of them for the frequencies."""

    def work(split: int) -> float:
        return length * sum(_WORK.get(f, 2.0 * f + 8) for f in _factors(length // split) or ()) + each * split

    return min((s for s in range(1, 17) if length % s == 0 and length // s >= 2), key=work, default=1)


_WORK = {2: 7.0, 3: 12.0, 4: 9.0, 5: 17.0}  # vector operations a point of a stage, its loads and stores among them

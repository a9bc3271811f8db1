"""The masks of highpass_filter as integers: one interval of columns per row, so that no kernel compares floats.

Published masks compare float32 distances, ours float64 frequencies. Either comparison is made here, once, on the host;
every backend then compares column numbers only and all of them share the same mask bits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MASKS = {"radial": 0.1, "disc_min": 0.7, "disc_max": 0.6}  # name -> default cutoff
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SpectralMask:
    """The gain of every bin of a half spectrum [H, W // 2 + 1], unshifted as rfft2 lays it out.

    ``gain[r, c] = (number of tables t with bounds[t, r, 0] <= c < bounds[t, r, 1]) / T
                 + (number of times (r, c) is listed in ring) / T``

    bounds: int32 [T, H, 2], half-open intervals of columns, valid for the columns 0..W-1 of a full spectrum too.
        T = 1, or 2 where an odd size makes the published mask differ from its mirror image: the real part of the
        filtered matrix is then what the mean of the two gives. An empty interval is (0, 0).
    ring: int32 [R, 2], (row, column) of bins of the half spectrum whose gain is raised; usually empty.
    columns: int32 [C], ascending: the half-spectrum columns that hold a gain other than 1; none for an identity.
    """

    height: int
    width: int
    bounds: Tensor
    ring: Tensor
    columns: Tensor

    @functools.cached_property
    def intervals(self) -> tuple[Tensor, Tensor]:
        """bounds as two contiguous int32 [T, H] tensors."""
        return self.bounds[..., 0].contiguous(), self.bounds[..., 1].contiguous()

    @property
    def keeps(self) -> bool:
        """Every column is touched: the gain is applied; else 1 - gain is, to the columns, and the result subtracted."""
        return len(self.columns) == self.width // 2 + 1

    @functools.cached_property
    def rows(self) -> Tensor:
        """int32, ascending, at least one: rows outside of which those columns are multiplied by 0."""
        low, high = self.intervals
        end = self.width // 2 + 1
        if self.keeps:
            touched = ((low < high) & (low < end)).any(0)
        else:
            touched = ((low > 0) | (high < end)).any(0)
        touched[self.ring[:, 0].long()] = True
        touched[0] = True
        return touched.nonzero()[:, 0].to(torch.int32)

    def gain(self) -> Tensor:
        """float64 [H, W // 2 + 1]: the definition above, spelled out."""
        tables = self.bounds.shape[0]
        column = torch.arange(self.width // 2 + 1, dtype=torch.int32, device="cpu")
        low, high = self.bounds[..., :1], self.bounds[..., 1:]  # [T, H, 1]
        total = ((column >= low) & (column < high)).sum(0).double()  # [H, W // 2 + 1]
        row, col = self.ring[:, 0].long(), self.ring[:, 1].long()
        total.index_put_((row, col), torch.ones(row.numel(), dtype=torch.float64, device="cpu"), accumulate=True)
        return total / tables


def _isqrt(n: Ints) -> Ints:
    """floor(sqrt(n)) of int64 0 <= n < 2^52, exactly."""
    root = np.floor(np.sqrt(n.astype(np.float64))).astype(np.int64)
    root -= root * root > n
    return root + ((root + 1) * (root + 1) <= n)


def _largest_square_within(radius: float, limit: int) -> int:
    """The largest integer n <= limit whose float32 square root is <= float32(radius), -1 if none: the published test."""
    r = np.float32(radius)
    low, high = -1, limit
    while low < high:  # float32 conversion and square root are monotonic
        middle = (low + high + 1) // 2
        if np.sqrt(np.float32(middle)) <= r:
            low = middle
        else:
            high = middle - 1
    return low


def _disc_bounds(height: int, width: int, radius: float) -> Ints:
    """[H, 2] columns with float32 distance to index (H // 2, W // 2) at most `radius`."""
    cy, cx = height // 2, width // 2
    most = _largest_square_within(radius, cy * cy + cx * cx)
    dy = np.arange(height, dtype=np.int64) - cy
    reach = most - dy * dy
    half = _isqrt(np.maximum(reach, 0))
    bounds = np.stack([np.maximum(cx - half, 0), np.minimum(cx + half + 1, width)], 1)
    bounds[reach < 0] = 0
    return bounds


def _radial_bounds(height: int, width: int, cutoff: float) -> Ints:
    """[H, 2] columns with sqrt(fy^2 + fx^2) >= cutoff in float64, f = 2 fftfreq(n) (Nyquist = 1)."""
    k = np.arange(height, dtype=np.int64)
    fy2 = (2.0 * (np.minimum(k, height - k) * (1.0 / height))) ** 2  # fftfreq multiplies by 1 / n, bit for bit
    end = width // 2 + 1

    def kept(column: Ints) -> npt.NDArray[np.bool_]:
        return np.asarray(np.sqrt(fy2 + (2.0 * (column * (1.0 / width))) ** 2) >= cutoff)

    beyond = min(cutoff, 4.0)  # no frequency is above sqrt(2); a huge square or index would overflow
    low = np.ceil(0.5 * width * np.sqrt(np.maximum(beyond * beyond - fy2, 0.0))).clip(0, end).astype(np.int64)
    # The guess is off by a rounding at most; the comparison itself is what counts.
    while (step := (low > 0) & kept(low - 1)).any():
        low -= step
    while (step := (low < end) & ~kept(low)).any():
        low += step
    bounds = np.stack([low, np.where(low == 0, width, width + 1 - low)], 1)
    bounds[low == end] = 0
    return bounds


def _mirror(bounds: Ints, height: int, width: int) -> Ints:
    """The intervals of the mask M(-k): row i takes row -i mod H, column j takes -j mod W."""
    source = bounds[(-np.arange(height)) % height]
    # An interval around W // 2 that reaches column 0 is the whole row, so that the image is one interval too.
    mirrored = np.stack([np.where(source[:, 0] == 0, 0, width + 1 - source[:, 1]), width + 1 - source[:, 0]], 1)
    mirrored[source[:, 0] == 0, 1] = width
    mirrored[source[:, 0] >= source[:, 1]] = 0
    return mirrored


def _ring_bins(height: int, width: int, radius: float, tables: int) -> Ints:
    """[R, 2] half-spectrum bins of the published doubled ring: float32 distance == min(H, W) // 10, inside the disc."""
    cy, cx, r0 = height // 2, width // 2, min(height, width) // 10
    if np.float32(r0) > np.float32(radius):
        return np.zeros((0, 2), np.int64)
    limit = cy * cy + cx * cx
    most = _largest_square_within(r0, limit)
    least = _largest_square_within(float(np.nextafter(np.float32(r0), np.float32(-1))), limit) + 1
    bins: list[tuple[int, int]] = []
    for i in range(max(0, cy - r0 - 1), min(height, cy + r0 + 2)):
        rest = (i - cy) ** 2
        if rest > most:
            continue
        low = math.isqrt(max(least - rest, 0))
        for dx in range(low, math.isqrt(most - rest) + 1):
            if dx * dx + rest >= least:
                bins += [(i, j) for j in {cx - dx, cx + dx} if 0 <= j < width]
    both = bins if tables == 1 else bins + [((-i) % height, (-j) % width) for i, j in bins]
    return np.array(sorted(b for b in both if b[1] <= width // 2), np.int64).reshape(-1, 2)


@functools.lru_cache(maxsize=64)
def spectral_mask(height: int, width: int, cutoff: float | None, mask: str, ring_double: bool) -> SpectralMask:
    """The mask of a [height, width] matrix; both at least 1. See highpass_filter for the parameters.

    Raises: ValueError for an unknown mask, a cutoff that is not a finite number >= 0, or ring_double with `radial`.
    """
    if mask not in MASKS:
        raise ValueError(f"highpass_filter: mask {mask!r} is not one of {', '.join(MASKS)}")
    cutoff = MASKS[mask] if cutoff is None else float(cutoff)
    if not (math.isfinite(cutoff) and cutoff >= 0):
        raise ValueError(f"highpass_filter: cutoff is {cutoff}; a finite number >= 0 is needed")
    ring: Ints = np.zeros((0, 2), np.int64)
    if mask == "radial":
        if ring_double:
            raise ValueError("highpass_filter: ring_double belongs to the masks disc_min and disc_max")
        tables = _radial_bounds(height, width, cutoff)[None]
    else:
        radius = cutoff * (min(height, width) if mask == "disc_min" else max(height, width))
        radius = min(radius, float(height + width))  # the whole plane; float32 holds no 1e300
        disc = _disc_bounds(height, width, radius)
        odd = height % 2 == 1 or width % 2 == 1
        tables = np.stack([disc, _mirror(disc, height, width)] if odd else [disc])
        if ring_double:
            ring = _ring_bins(height, width, radius, len(tables))
    end = width // 2 + 1
    # Clipped to the half spectrum an interval [low, high) leaves out the columns below low and those from high on.
    left_out = np.where(tables[..., 1] < end, end, tables[..., 0])
    left_out = np.where(tables[..., 0] >= np.minimum(tables[..., 1], end), end, left_out)
    columns = np.union1d(np.arange(left_out.max()), ring[:, 1])
    return SpectralMask(
        height=height,
        width=width,
        bounds=torch.from_numpy(np.ascontiguousarray(tables, np.int32)),
        ring=torch.from_numpy(ring.astype(np.int32)),
        columns=torch.from_numpy(columns.astype(np.int32)),
    )

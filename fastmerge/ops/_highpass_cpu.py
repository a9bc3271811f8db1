"""highpass_filter on the CPU: row transforms in blocks that stay in cache, and a thin spectrum of the columns between.

Rows whose length is even and has no large prime factor go through csrc/ops/highpass_rows.cpp, many at a time; others
through torch's transforms. Columns go through torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import _native
from ._lane_transform import LaneTransform, column_transform, row_transform
from ._spectral_mask import SpectralMask

# Elements of a block of columns, and per thread of one of rows: input and spectrum together stay in a core's L2.
_ROW_BLOCK, _COLUMN_BLOCK = 1 << 17, 1 << 17
_LEAST = 32  # transforms a call at least: for a length with a large prime factor, setting one up costs several of them
_LEAST_LONG, _LONG = 16, 1 << 16  # of columns longer than this: memory counts too
_GROUP_BYTES = 64 << 20  # spectrum columns held at a time for a batch of small matrices
LANES = 16  # rows that the kernels take together, in float32


def _blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of blocks of about `size`, none of length one unless count is one.

    One transform alone takes another route through MKL than two or more, with other bits; in company, a transform's
    result depends neither on how many there are nor on the threads. So none is ever alone.
    """
    begin = 0
    while begin < count:
        end = count if count - begin <= size + 1 else begin + size
        yield begin, end
        begin = end


def _accompanied(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A 1-D transform of every row of x, a lone row being transformed twice (see _blocks)."""
    return transform(x) if x.shape[0] > 1 else transform(torch.cat([x, x]))[:1]


_SHORT = 64  # rows up to this long: MKL's real transforms have other bits with one thread than with several


def _rfft(rows: Tensor) -> Tensor:
    """[n, W] -> [n, W // 2 + 1], the same bits for any number of threads."""
    width = rows.shape[1]
    if width > _SHORT:
        return _accompanied(torch.fft.rfft, rows)
    return _accompanied(torch.fft.fft, torch.complex(rows, torch.zeros_like(rows)))[:, : width // 2 + 1].contiguous()


def _irfft(half: Tensor, width: int) -> Tensor:
    """[n, W // 2 + 1] -> [n, W], the same bits for any number of threads."""
    if width > _SHORT:
        return _accompanied(lambda t: torch.fft.irfft(t, n=width), half)
    mirrored = half[:, 1 : (width + 1) // 2].flip(-1).conj()
    return _accompanied(torch.fft.ifft, torch.cat([half, mirrored], 1)).real.contiguous()


@functools.lru_cache(maxsize=64)
def row_transform_of(plan: SpectralMask, compute: torch.dtype) -> LaneTransform | None:
    """The kernels' tables for the mask's rows, or None where they go through torch."""
    return row_transform(plan.width, plan.columns, compute)


@functools.lru_cache(maxsize=64)
def column_transform_of(plan: SpectralMask, compute: torch.dtype) -> LaneTransform | None:
    """The kernels' tables for its columns, or None where they go through torch."""
    return column_transform(plan.height, plan.rows, compute)


def _suffix(compute: torch.dtype) -> str:
    return "f64" if compute == torch.float64 else "f32"


def _complex(compute: torch.dtype) -> torch.dtype:
    return torch.complex128 if compute == torch.float64 else torch.complex64


Scratch = Callable[[str, int, torch.dtype], Tensor]


class Passes:
    """The filter of the weighted sum of `matrices` matrices' deltas, in two passes over rows and one over columns.

    Between the passes only the thin spectrum is held. Any block of rows may be fed in any order, from any thread, in
    either pass; no bit of the result depends on how. The rows' elements are those of base and models, contiguous.
    """

    def __init__(
        self, plan: SpectralMask, transform: LaneTransform, compute: torch.dtype, scratch: Scratch, matrices: int = 1
    ) -> None:
        """scratch(key, numel, dtype) gives flat memory, which is used until the last row is out."""
        self._plan, self._scratch, self._matrices, self._compute = plan, scratch, matrices, compute
        columns = matrices * len(plan.columns)
        pair = _complex(compute)
        self._spectrum = scratch("spectrum", columns * plan.height, pair).view(columns, plan.height)
        self._arguments = (plan.width, *transform.arguments)
        self._tables = transform  # what the arguments point to

    def _place(self, first: int, rows: int) -> list[int]:
        return [self._matrices, rows, first, self._plan.height]

    def forward(
        self, first: int, rows: int, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float],
        keep: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Rows [first, first + rows) of each matrix into the spectrum; their deltas into `keep`, of the compute dtype."""
        inputs = [*([] if base is None else [base]), *models]
        getattr(_native.lib(), f"highpass_forward_{_suffix(self._compute)}")(
            [t.data_ptr() for t in inputs], [_native.DTYPES[t.dtype] for t in inputs], base is not None,
            list(weights), 0 if keep is None else keep.data_ptr(), self._place(first, rows), *self._arguments,
            self._spectrum.data_ptr(), _native.threads(),
        )  # fmt: skip

    def filter_columns(self) -> None:
        """Between the two passes, once: transform, mask and transform back every column."""
        filter_columns(self._spectrum, self._plan, self._compute, self._scratch)
        clean = _finite(self._spectrum, len(self._plan.columns))
        if not clean.all():  # a NaN or Inf makes its whole matrix NaN
            held = self._spectrum.view(self._matrices, -1, self._plan.height)
            torch.view_as_real(held)[~clean] = torch.nan

    def inverse(
        self, first: int, rows: int, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float],
        out: Tensor, *, add_base: bool, delta: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The filtered deltas of these rows, plus the base with add_base, rounded to `out`, which may be `delta`.

        delta: what `forward` kept; the models are then not looked at.
        """
        inputs = [*([] if base is None else [base]), *models]
        getattr(_native.lib(), f"highpass_inverse_{_suffix(self._compute)}")(
            [t.data_ptr() for t in inputs], [_native.DTYPES[t.dtype] for t in inputs], base is not None,
            list(weights), 0 if delta is None else delta.data_ptr(), add_base, not self._plan.keeps, out.data_ptr(),
            _native.DTYPES[out.dtype], self._place(first, rows), *self._arguments, self._spectrum.data_ptr(),
            _native.threads(),
        )  # fmt: skip


def _finite(spectrum: Tensor, count: int) -> Tensor:
    """[G]: one value per matrix tells whether it held a NaN or an Inf, every bin being a sum over all of its elements."""
    return torch.view_as_real(spectrum[::count, :1]).isfinite().all(-1).all(-1)


def _panel(height: int) -> int:
    """Columns transformed together."""
    return max(_LEAST if height <= _LONG else _LEAST_LONG, _COLUMN_BLOCK // height)


def _column_work(plan: SpectralMask, transform: LaneTransform) -> int:
    """Bytes that a thread takes for sixteen columns of float32, or eight of float64."""
    return 128 * (plan.height + len(transform.wanted) + 2 * transform.points)


def held_bytes(plan: SpectralMask, compute: torch.dtype) -> int | None:
    """Memory of :class:`Passes` besides its rows' inputs and results, or None where there is no transform for it."""
    rows, columns = row_transform_of(plan, compute), column_transform_of(plan, compute)
    if rows is None:
        return None
    pair, count, threads = 2 * compute.itemsize, len(plan.columns), _native.threads()
    work = threads * 64 * (3 * plan.width + 2 * count + 4 * rows.points)
    if columns is None:
        work += 3 * pair * plan.height * min(count, _panel(plan.height))
    else:
        work += threads * _column_work(plan, columns)
    return pair * plan.height * count + work


def filter_columns(spectrum: Tensor, plan: SpectralMask, compute: torch.dtype, scratch: Scratch) -> None:
    """In place: spectrum [G C, H] of G matrices, transformed, masked and transformed back along H."""
    native, threads, suffix = _native.lib(), _native.threads(), _suffix(compute)
    count, height = len(plan.columns), plan.height
    low, high = plan.intervals
    mask = (low.data_ptr(), high.data_ptr(), low.shape[0], plan.ring.data_ptr(), len(plan.ring), plan.keeps)
    transform = column_transform_of(plan, compute)
    if transform is not None:
        piece = _column_work(plan, transform)
        work = scratch("columns", 8 + threads * piece // 8, torch.float64)  # 8 more, to align
        getattr(native, f"highpass_columns_{suffix}")(
            spectrum.data_ptr(), spectrum.shape[0] // count, plan.columns.data_ptr(), count, height, *mask,
            *transform.arguments, -(-work.data_ptr() // 64) * 64, piece, threads,
        )  # fmt: skip
        return
    for a, b in _blocks(spectrum.shape[0], _panel(height)):
        panel = _accompanied(torch.fft.fft, spectrum[a:b])  # [b - a, H]
        getattr(native, f"highpass_mask_{suffix}")(
            panel.data_ptr(), b - a, height, a, plan.columns.data_ptr(), count, *mask, threads
        )
        spectrum[a:b] = _accompanied(torch.fft.ifft, panel)


def fresh(key: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Scratch memory that is not kept."""
    return _native.fresh((numel,), dtype)


def filter_matrices(rows: Tensor, out: Tensor, plan: SpectralMask, compute: torch.dtype) -> None:
    """rows, out: [G H, W] of G whole matrices; out contiguous, may be rows itself."""
    transform = row_transform_of(plan, compute)
    size, count, height = compute.itemsize * 2, len(plan.columns), plan.height
    group = height * max(1, _GROUP_BYTES // (count * height * size))
    whole = rows.contiguous() if transform is not None else rows
    for begin in range(0, rows.shape[0], group):
        end = min(rows.shape[0], begin + group)
        matrices = (end - begin) // height
        if transform is None:
            _through_torch(rows[begin:end], out[begin:end], plan, compute)
            continue
        passes = Passes(plan, transform, compute, fresh, matrices)
        part, into = [whole[begin:end]], out[begin:end]
        passes.forward(0, height, None, part, [1.0])
        passes.filter_columns()
        passes.inverse(0, height, None, part, [1.0], into, add_base=False)


def _through_torch(rows: Tensor, out: Tensor, plan: SpectralMask, compute: torch.dtype) -> None:
    native, threads, suffix = _native.lib(), _native.threads(), _suffix(compute)
    half, count, height = plan.width // 2 + 1, len(plan.columns), plan.height
    row_block = max(_LEAST, threads * _ROW_BLOCK // plan.width)
    columns = plan.columns.data_ptr()
    spectrum = _native.fresh((rows.shape[0] // height * count, height), _complex(compute))
    for a, b in _blocks(rows.shape[0], row_block):
        block = _rfft(rows[a:b].to(compute))  # [b - a, W // 2 + 1]
        getattr(native, f"highpass_gather_{suffix}")(
            block.data_ptr(), half, a, b - a, height, columns, count, spectrum.data_ptr(), threads
        )
    filter_columns(spectrum, plan, compute, fresh)
    clean = _finite(spectrum, count)
    for a, b in _blocks(rows.shape[0], row_block):
        block = torch.empty(b - a, half, dtype=_complex(compute))
        getattr(native, f"highpass_scatter_{suffix}")(
            block.data_ptr(), half, a, b - a, height, columns, count, spectrum.data_ptr(), threads
        )
        part = _irfft(block, plan.width)  # [b - a, W]
        x = None if plan.keeps else rows[a:b].contiguous()
        getattr(native, f"highpass_finish_{suffix}")(
            out.data_ptr() + a * plan.width * out.element_size(), _native.DTYPES[out.dtype],
            0 if x is None else x.data_ptr(), _native.DTYPES[rows.dtype], part.data_ptr(), part.numel(), threads,
        )  # fmt: skip
    if not clean.all():
        out.view(-1, height, plan.width)[~clean] = torch.nan

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
from ._row_transform import RowTransform, row_transform
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
def _transform(width: int, columns: tuple[int, ...], dtype: torch.dtype) -> RowTransform | None:
    return row_transform(width, torch.tensor(columns, dtype=torch.int32), dtype)


def transform_of(plan: SpectralMask, compute: torch.dtype) -> RowTransform | None:
    """The kernel's tables for the mask's rows, or None where they go through torch."""
    return _transform(plan.width, plan.column_list, compute)


def _suffix(compute: torch.dtype) -> str:
    return "f64" if compute == torch.float64 else "f32"


def _complex(compute: torch.dtype) -> torch.dtype:
    return torch.complex128 if compute == torch.float64 else torch.complex64


class Passes:
    """The filter of the weighted sum of `matrices` matrices' deltas, in two passes over rows and one over columns.

    Between the passes only the thin spectrum is held. Any block of rows may be fed in any order, from any thread, in
    either pass; no bit of the result depends on how. The rows' elements are those of base and models, contiguous.
    """

    def __init__(
        self, plan: SpectralMask, transform: RowTransform, compute: torch.dtype, spectrum: Tensor, matrices: int = 1
    ) -> None:
        """spectrum: complex [matrices C, H], uninitialised; see :func:`spectrum_bytes`."""
        self._plan, self._spectrum, self._matrices, self._compute = plan, spectrum, matrices, compute
        self._arguments = transform.arguments
        self._tables = transform  # what the arguments point to
        self._keeps = len(plan.columns) == plan.width // 2 + 1  # the gain is applied, nothing is subtracted

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
        filter_columns(self._spectrum, self._plan)
        clean = _finite(self._spectrum, len(self._plan.columns))
        if not clean.all():  # a NaN or Inf makes its whole matrix NaN
            held = self._spectrum.view(self._matrices, -1, self._plan.height)
            held[~clean] = complex(float("nan"), float("nan"))

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
            list(weights), 0 if delta is None else delta.data_ptr(), add_base, not self._keeps, out.data_ptr(),
            _native.DTYPES[out.dtype], self._place(first, rows), *self._arguments, self._spectrum.data_ptr(),
            _native.threads(),
        )  # fmt: skip


def spectrum_shape(plan: SpectralMask, matrices: int = 1) -> tuple[int, int]:
    return matrices * len(plan.columns), plan.height


def _finite(spectrum: Tensor, count: int) -> Tensor:
    """[G]: one value per matrix tells whether it held a NaN or an Inf, every bin being a sum over all of its elements."""
    return torch.view_as_real(spectrum[::count, :1]).isfinite().all(-1).all(-1)


def _panel(height: int) -> int:
    """Columns transformed together."""
    return max(_LEAST if height <= _LONG else _LEAST_LONG, _COLUMN_BLOCK // height)


def held_bytes(height: int, width: int, plan: SpectralMask, compute: torch.dtype) -> int | None:
    """Memory of :class:`Passes` besides its rows' inputs and results, or None where there is no transform for it."""
    transform = transform_of(plan, compute)
    if transform is None:
        return None
    pair, count = 2 * compute.itemsize, len(plan.columns)
    work = LANES * (4 * width + 2 * pair * (count + width // (2 * transform.split)))  # of each thread
    return pair * height * (count + 3 * min(count, _panel(height))) + _native.threads() * work


def filter_columns(spectrum: Tensor, plan: SpectralMask) -> None:
    """In place: spectrum [G C, H] of G matrices, transformed, masked and transformed back along H."""
    native, threads = _native.lib(), _native.threads()
    suffix = "f64" if spectrum.dtype == torch.complex128 else "f32"
    count, height = len(plan.columns), plan.height
    keep = count == plan.width // 2 + 1
    low, high = plan.intervals
    for a, b in _blocks(spectrum.shape[0], _panel(height)):
        panel = _accompanied(torch.fft.fft, spectrum[a:b])  # [b - a, H]
        getattr(native, f"highpass_mask_{suffix}")(
            panel.data_ptr(), b - a, height, a, plan.columns.data_ptr(), count, low.data_ptr(), high.data_ptr(),
            low.shape[0], plan.ring.data_ptr(), len(plan.ring), keep, threads,
        )  # fmt: skip
        spectrum[a:b] = _accompanied(torch.fft.ifft, panel)


def filter_matrices(rows: Tensor, out: Tensor, plan: SpectralMask, compute: torch.dtype) -> None:
    """rows, out: [G H, W] of G whole matrices; out contiguous, may be rows itself."""
    transform = transform_of(plan, compute)
    size, count, height = compute.itemsize * 2, len(plan.columns), plan.height
    group = height * max(1, _GROUP_BYTES // (count * height * size))
    whole = rows.contiguous() if transform is not None else rows
    for begin in range(0, rows.shape[0], group):
        end = min(rows.shape[0], begin + group)
        matrices = (end - begin) // height
        spectrum = _native.fresh(spectrum_shape(plan, matrices), _complex(compute))
        if transform is None:
            _through_torch(rows[begin:end], out[begin:end], plan, spectrum, compute)
            continue
        passes = Passes(plan, transform, compute, spectrum, matrices)
        part, into = [whole[begin:end]], out[begin:end]
        passes.forward(0, height, None, part, [1.0])
        passes.filter_columns()
        passes.inverse(0, height, None, part, [1.0], into, add_base=False)


def _through_torch(rows: Tensor, out: Tensor, plan: SpectralMask, spectrum: Tensor, compute: torch.dtype) -> None:
    native, threads, suffix = _native.lib(), _native.threads(), _suffix(compute)
    half, count, height = plan.width // 2 + 1, len(plan.columns), plan.height
    row_block = max(_LEAST, threads * _ROW_BLOCK // plan.width)
    columns = plan.columns.data_ptr()
    for a, b in _blocks(rows.shape[0], row_block):
        block = _rfft(rows[a:b].to(compute))  # [b - a, W // 2 + 1]
        getattr(native, f"highpass_gather_{suffix}")(
            block.data_ptr(), half, a, b - a, height, columns, count, spectrum.data_ptr(), threads
        )
    filter_columns(spectrum, plan)
    clean = _finite(spectrum, count)
    for a, b in _blocks(rows.shape[0], row_block):
        block = torch.empty(b - a, half, dtype=_complex(compute))
        getattr(native, f"highpass_scatter_{suffix}")(
            block.data_ptr(), half, a, b - a, height, columns, count, spectrum.data_ptr(), threads
        )
        part = _irfft(block, plan.width)  # [b - a, W]
        x = None if count == half else rows[a:b].contiguous()
        getattr(native, f"highpass_finish_{suffix}")(
            out.data_ptr() + a * plan.width * out.element_size(), _native.DTYPES[out.dtype],
            0 if x is None else x.data_ptr(), _native.DTYPES[rows.dtype], part.data_ptr(), part.numel(), threads,
        )  # fmt: skip
    if not clean.all():
        out.view(-1, height, plan.width)[~clean] = torch.nan

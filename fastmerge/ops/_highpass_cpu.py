"""highpass_filter on the CPU: torch.fft's row transforms in blocks that stay in cache, and a thin spectrum of the columns
between (csrc/ops/highpass_filter.cpp has the story)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .. import _native
from ._spectral_mask import SpectralMask

# Elements of a block of columns, and per thread of one of rows: input and spectrum together stay in a core's L2.
_ROW_BLOCK, _COLUMN_BLOCK = 1 << 17, 1 << 17
_LEAST = 32  # transforms a call at least: for a length with a large prime factor, setting one up costs several of them
_LEAST_LONG, _LONG = 16, 1 << 16  # of columns longer than this: memory counts too
_SHARED = 1 << 23  # elements from which blocks go to threads of their own
_GROUP_BYTES = 64 << 20  # spectrum columns held at a time for a batch of small matrices
LANES = 16  # rows, at least, that are worth a call


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


def _together(length: int, elements: int) -> int:
    """Transforms of `length` that go together, of about so many elements in all."""
    return max(_LEAST if length <= _LONG else _LEAST_LONG, elements // length)


def _each_block(count: int, length: int, elements: int, task: Callable[[int, int], None]) -> None:
    """task(begin, end) for blocks of `count` transforms of `length`."""
    if count * length < _SHARED:  # torch's own threads are less to start
        for block in _blocks(count, _together(length, elements * _native.threads())):
            task(*block)
    else:
        blocks = list(_blocks(count, _together(length, elements)))
        _native.each(len(blocks), lambda i: task(*blocks[i]))


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


def _suffix(compute: torch.dtype) -> str:
    return "f64" if compute == torch.float64 else "f32"


def _complex(compute: torch.dtype) -> torch.dtype:
    return torch.complex128 if compute == torch.float64 else torch.complex64


Scratch = Callable[[str, int, torch.dtype], Tensor]


class _Inputs:
    """The rows of a weighted sum of deltas: base and models, contiguous, [rows, W] each."""

    def __init__(
        self, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float], width: int, compute: torch.dtype
    ) -> None:
        self.tensors = [*([] if base is None else [base]), *models]
        self.types = [_native.DTYPES[t.dtype] for t in self.tensors]
        self.has_base, self.weights, self.width, self.compute = base is not None, list(weights), width, compute
        plain = base is None and len(models) == 1 and self.weights == [1.0] and models[0].dtype == compute
        self.sums = models[0].view(-1, width) if plain else None  # one input is its own sum

    def at(self, row: int) -> list[int]:
        """Addresses of a row."""
        return [t.data_ptr() + row * self.width * t.element_size() for t in self.tensors]

    def add_up(self, begin: int, end: int, out: Tensor) -> Tensor:
        """Rows [begin, end) of the sum: where they lie already, else in `out`."""
        if self.sums is not None:
            return self.sums[begin:end]
        out = out[: end - begin]
        _native.lib().weighted_sum(
            out.data_ptr(), _native.DTYPES[self.compute], self.at(begin), self.types, out.numel(), self.has_base, False,
            self.weights, False, 1.0, 1.0, _native.threads(),
        )  # fmt: skip
        return out


class Passes:
    """The filter of the weighted sum of `matrices` matrices' deltas, in two passes over rows and one over columns.

    Between the passes only the thin spectrum is held. Any block of rows may be fed in any order, from any thread, in
    either pass; no bit of the result depends on how. The rows' elements are those of base and models, contiguous.
    """

    def __init__(self, plan: SpectralMask, compute: torch.dtype, scratch: Scratch, matrices: int = 1) -> None:
        """scratch(key, numel, dtype) gives flat memory, which is used until the last row is out."""
        self._plan, self._scratch, self._matrices, self._compute = plan, scratch, matrices, compute
        columns = matrices * len(plan.columns)
        pair = _complex(compute)
        self._spectrum = scratch("spectrum", columns * plan.height, pair).view(columns, plan.height)

    def _move(self, how: str, block: Tensor, row: int) -> None:
        """The touched columns of a block of half spectra [n, W // 2 + 1], to ("gather") or from the thin spectrum."""
        plan = self._plan
        getattr(_native.lib(), f"highpass_{how}_{_suffix(self._compute)}")(
            block.data_ptr(), block.shape[1], row, block.shape[0], plan.height, plan.columns.data_ptr(),
            len(plan.columns), self._spectrum.data_ptr(), _native.threads(),
        )  # fmt: skip

    def forward(
        self, first: int, rows: int, base: Tensor | None, models: Sequence[Tensor], weights: Sequence[float],
        keep: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Rows [first, first + rows) into the spectrum; their deltas into `keep`, of the compute dtype, if it is given.

        Rows count through all matrices.
        """
        width = self._plan.width
        inputs = _Inputs(base, models, weights, width, self._compute)
        kept = None if keep is None else keep.view(rows, width)

        def transform(a: int, b: int) -> None:
            into = torch.empty(b - a, width, dtype=self._compute, device="cpu") if kept is None else kept[a:b]
            self._move("gather", _rfft(inputs.add_up(a, b, into)), first + a)

        _each_block(rows, width, _ROW_BLOCK, transform)
        if kept is not None and inputs.sums is not None:
            kept.copy_(inputs.sums)

    def filter_columns(self) -> None:
        """Between the two passes, once: transform, mask and transform back every column."""
        filter_columns(self._spectrum, self._plan, self._compute)
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
        width = self._plan.width
        inputs = _Inputs(base, models, weights, width, self._compute)
        sums = inputs.sums if delta is None else delta

        def transform(a: int, b: int) -> None:
            half = torch.empty(b - a, width // 2 + 1, dtype=_complex(self._compute), device="cpu")
            self._move("scatter", half, first + a)
            low, at = _irfft(half, width), a * width
            getattr(_native.lib(), f"highpass_finish_{_suffix(self._compute)}")(
                inputs.at(a), inputs.types, inputs.has_base, inputs.weights,
                0 if sums is None else sums.data_ptr() + at * sums.element_size(), add_base, not self._plan.keeps,
                out.data_ptr() + at * out.element_size(), _native.DTYPES[out.dtype], low.data_ptr(), low.numel(),
                rows * width, _native.threads(),
            )  # fmt: skip

        _each_block(rows, width, _ROW_BLOCK, transform)


def _finite(spectrum: Tensor, count: int) -> Tensor:
    """[G]: one value per matrix tells whether it held a NaN or an Inf, every bin being a sum over all of its elements."""
    return torch.view_as_real(spectrum[::count, :1]).isfinite().all(-1).all(-1)


def held_bytes(plan: SpectralMask, compute: torch.dtype) -> int:
    """Memory of :class:`Passes` besides its rows' inputs and results."""
    pair, count = 2 * compute.itemsize, len(plan.columns)
    # Sums, their spectrum, and a transform's own copies; every thread has a block of its own.
    rows = _native.threads() * 3 * pair * plan.width * (_together(plan.width, _ROW_BLOCK) + 1)
    columns = 4 * pair * plan.height * min(count, _native.threads() * (_together(plan.height, _COLUMN_BLOCK) + 1))
    return pair * plan.height * count + max(rows, columns)


def filter_columns(spectrum: Tensor, plan: SpectralMask, compute: torch.dtype) -> None:
    """In place: spectrum [G C, H] of G matrices, transformed, masked and transformed back along H."""
    count, height = len(plan.columns), plan.height
    low, high = plan.intervals
    mask = (low.data_ptr(), high.data_ptr(), low.shape[0], plan.ring.data_ptr(), len(plan.ring), plan.keeps)

    def transform(a: int, b: int) -> None:
        panel = _accompanied(torch.fft.fft, spectrum[a:b])  # [b - a, H]
        getattr(_native.lib(), f"highpass_mask_{_suffix(compute)}")(
            panel.data_ptr(), b - a, height, a, plan.columns.data_ptr(), count, *mask, _native.threads()
        )
        spectrum[a:b] = _accompanied(torch.fft.ifft, panel)

    _each_block(spectrum.shape[0], height, _COLUMN_BLOCK, transform)


def fresh(key: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Scratch memory that is not kept."""
    return _native.fresh((numel,), dtype)


def filter_matrices(rows: Tensor, out: Tensor, plan: SpectralMask, compute: torch.dtype) -> None:
    """rows, out: [G H, W] of G whole matrices; out contiguous, may be rows itself."""
    size, count, height = compute.itemsize * 2, len(plan.columns), plan.height
    group = height * max(1, _GROUP_BYTES // (count * height * size))
    whole = rows.contiguous()
    for begin in range(0, rows.shape[0], group):
        end = min(rows.shape[0], begin + group)
        passes = Passes(plan, compute, fresh, (end - begin) // height)
        part, into = [whole[begin:end]], out[begin:end]
        passes.forward(0, end - begin, None, part, [1.0])
        passes.filter_columns()
        passes.inverse(0, end - begin, None, part, [1.0], into, add_base=False)

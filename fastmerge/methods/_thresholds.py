"""Magnitude thresholds and L1 factors of streamed tensors: what trimming methods scan for."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, ops
from ..errors import BadInput
from ..ops.rescale import L1Stream
from ..ops.threshold import Rule, Threshold, Window
from ..ops.threshold_stream import SPAN, ThresholdStream
from ._method import Header, TensorStream

WHOLE = 1 << 18  # elements up to which a tensor is read at once instead of streamed
SPANS = 1024  # spans of a sample that are read in one go


def found_by_kernels(tensor: TensorStream, **options: Any) -> bool:
    """Whether the merge itself finds thresholds and L1 factors: tensors on a GPU, in one piece, merged by Triton.

    Its kernels leave them on the device, so that the host does not wait; `options` are consensus_merge's.
    """
    if not tensor.resident:
        return False
    base, models = tensor.read(0, tensor.numel)
    told = ops.consensus_merge.explain(base, models, 1.0, **options)
    return told.chosen == "triton" and dict(told.reasons)["triton"] is None


class Lanes:
    """A lane of a ThresholdStream for each thread that feeds it; threads beyond their number take turns."""

    count = 16

    def __init__(self) -> None:
        self._locks = [threading.Lock() for _ in range(self.count)]
        self._next = itertools.count()
        self._local = threading.local()

    @contextlib.contextmanager
    def mine(self) -> Iterator[int]:
        """The calling thread's lane, nobody else's meanwhile."""
        if not hasattr(self._local, "lane"):
            self._local.lane = next(self._next) % self.count
        lane: int = self._local.lane
        with self._locks[lane]:
            yield lane


def tensor_thresholds(
    tensor: TensorStream, density: Sequence[float], gamma: Sequence[float] | None = None
) -> list[Rule]:
    """One exact rule per model for this tensor's deltas; reads the inputs once, and small parts of them again."""
    if tensor.resident or tensor.numel <= WHOLE:
        return ops.topk_thresholds(
            *tensor.read(0, tensor.numel), list(density), gamma=None if gamma is None else list(gamma)
        )
    return _stream([tensor], density, gamma)


def model_thresholds(tensors: Iterable[TensorStream]) -> list[Rule] | None:
    """One rule per model over all tensors, positions counted in their concatenation; None for ``scope: tensor``."""
    every = sorted(tensors, key=lambda t: t.start)
    if not every or every[0].parameters["scope"] != "model":
        return None
    return _stream([t for t in every if t.numel], every[0].parameters["density"], None)


def check_scope(tensors: Sequence[Header]) -> None:
    """A selection over the whole model has one scope and one density per model; raises BadInput for the tensor that differs."""
    ordered = sorted(tensors, key=lambda t: t.parameters["scope"] != "model")
    for t in ordered[1:] if ordered and ordered[0].parameters["scope"] == "model" else ():
        if any(t.parameters[key] != ordered[0].parameters[key] for key in ("scope", "density")):
            raise BadInput(
                f"with scope: model, scope and density must be the same for every tensor, but {t.name!r} differs",
                remedy="give them without filters and gradients, or use scope: tensor",
            )


def of_tensor(rules: Sequence[Rule], tensor: TensorStream) -> list[Rule]:
    """A tensor's own rules out of those of the concatenation."""
    return [r.shifted(tensor.start) if isinstance(r, Threshold) else r for r in rules]


def _stream(tensors: Sequence[TensorStream], density: Sequence[float], gamma: Sequence[float] | None) -> list[Rule]:
    """Selection over the concatenation of `tensors` (positions from the first one's beginning for a single tensor)."""
    starts = [t.start if len(tensors) > 1 else 0 for t in tensors]
    n = starts[-1] + tensors[-1].numel
    wide = torch.float64 if any(t.compute == torch.float64 for t in tensors) else torch.float32
    lanes = Lanes()
    selection = ThresholdStream(n, list(density), models=tensors[0].count, gamma=gamma, compute=wide, lanes=lanes.count)

    def parts(begin: int, end: int) -> Iterable[tuple[TensorStream, int, int, int]]:
        """(tensor, its place in the concatenation, local begin, local end) of the tensors that [begin, end) touches."""
        for i in range(max(0, bisect.bisect_right(starts, begin) - 1), len(tensors)):
            t, start = tensors[i], starts[i]
            if start >= end:
                break
            low, high = max(begin - start, 0), min(end - start, t.numel)
            if low < high:
                yield t, start, low, high

    # Sampling and choosing are short: a second thread would spend more time waiting for them than it saves.
    with _native.limit_threads(1):
        inside: dict[int, list[int]] = {}  # spans within one tensor, by its place in the concatenation
        for begin, end in selection.sample_spans():
            here = list(parts(begin, end))
            for t, start, low, high in here:
                if len(here) == 1:
                    inside.setdefault(start, []).append(low)
                else:
                    selection.add_sample(*t.read(low, high))
        for t, start in zip(tensors, starts, strict=True):
            begins = inside.get(start, [])
            for i in range(0, len(begins), SPANS):
                selection.add_sample(*t.read_spans(begins[i : i + SPANS], SPAN), length=SPAN)

    def advance() -> list[tuple[int, int]]:
        with _native.limit_threads(1):
            return selection.advance()

    while spans := advance():
        for begin, end in spans:
            for t, start, low, high in parts(begin, end):
                if high - low == t.numel:

                    def visit(offset: int, base: Tensor | None, models: list[Tensor], start: int = start) -> None:
                        with lanes.mine() as lane:
                            selection.feed(base, models, start + offset, lane=lane)

                    t.for_each(visit)
                else:
                    for at in range(low, high, WHOLE):
                        selection.feed(*t.read(at, min(at + WHOLE, high)), start + at)
    return selection.finish()


def l1_factors(tensor: TensorStream, **trim: Any) -> list[float]:
    """‖δ‖₁ / ‖δ'‖₁ per model for the L1 rescale, in one more pass; `trim` as L1Stream takes it."""
    sums = L1Stream(**trim)
    tensor.for_each(lambda offset, base, models: sums.feed(base, models, offset))
    return sums.finish()


__all__ = [
    "Lanes",
    "Threshold",
    "Window",
    "check_scope",
    "found_by_kernels",
    "l1_factors",
    "model_thresholds",
    "of_tensor",
    "tensor_thresholds",
]

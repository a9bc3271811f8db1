"""Exact selections and order statistics of a score that is computed from the inputs, element by element."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _native
from ..ops.threshold import KEEP_NONE, Rule, Threshold, topk_thresholds
from ..ops.threshold_stream import ThresholdStream
from ._method import TensorStream
from ._thresholds import WHOLE, Lanes

Score = Callable[[int, Tensor | None, list[Tensor]], Tensor]  # (offset, base, models) -> flat scores >= 0


def largest(tensor: TensorStream, score: Score, counts: Sequence[int]) -> list[Rule]:
    """Per count k the rule that keeps the k largest scores, ties to the lowest index; needs the native module on the CPU.

    Reads the inputs once, and small parts of them again; memory does not grow with the tensor. Class A for a score that
    depends on its element only.
    """
    n = tensor.numel
    # int(density * n) is the count again, whatever the rounding of the quotient
    density = [1.0 if k >= n else 0.0 if k <= 0 else (k + 0.5) / n for k in counts]
    if tensor.resident or n <= WHOLE:
        scores = score(0, *tensor.read(0, n)).reshape(-1)
        return topk_thresholds(None, [scores] * len(counts), density)
    lanes = Lanes()
    selection = ThresholdStream(n, density, models=len(counts), compute=tensor.compute, lanes=lanes.count)
    with _native.limit_threads(1):
        for begin, end in selection.sample_spans():
            selection.add_sample(None, [score(begin, *tensor.read(begin, end))] * len(counts))

    def feed(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        values = [score(offset, base, models)] * len(counts)
        with lanes.mine() as lane:
            selection.feed(None, values, offset, lane=lane)

    while spans := selection.advance():
        for begin, end in spans:
            if end - begin == n:
                tensor.for_each(feed)
            else:
                for at in range(begin, end, WHOLE):
                    feed(at, *tensor.read(at, min(at + WHOLE, end)))
    return selection.finish()


def largest_share(tensor: TensorStream, score: Score, share: float) -> Rule:
    """The rule that keeps the int(share · #{score ≠ 0}) largest scores, ties to the lowest index; share < 1.

    One read of the inputs counts and selects, as a sample tells the count well enough to know where to look.
    """
    n = tensor.numel
    if tensor.resident or n <= WHOLE:
        scores = score(0, *tensor.read(0, n)).reshape(-1)
        k = int(share * int(scores.count_nonzero()))
        return topk_thresholds(None, [scores], (k + 0.5) / n)[0] if k else KEEP_NONE
    lanes = Lanes()
    with _native.limit_threads(1):
        spans = ThresholdStream(n, 0.5, models=1, compute=tensor.compute).sample_spans()
        samples = [score(begin, *tensor.read(begin, end)) for begin, end in spans]
        sampled = sum(s.numel() for s in samples)
        differ = sum(int(s.count_nonzero()) for s in samples) / sampled if sampled else 1.0
        density = (min(max(int(share * differ * n), 1), n - 1) + 0.5) / n
        selection = ThresholdStream(n, density, models=1, compute=tensor.compute, lanes=lanes.count)
        for s in samples:
            selection.add_sample(None, [s])
    counts = [0] * lanes.count

    def feed(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        scores = score(offset, base, models).reshape(-1)
        here = int(scores.count_nonzero())
        with lanes.mine() as lane:
            counts[lane] += here
            selection.feed(None, [scores], offset, lane=lane)

    aimed = False
    while spans := selection.advance():
        for begin, end in spans:
            if end - begin == n:
                tensor.for_each(feed)
            else:
                for at in range(begin, end, WHOLE):
                    feed(at, *tensor.read(at, min(at + WHOLE, end)))
        if not aimed:
            k = int(share * sum(counts))
            if k == 0:
                return KEEP_NONE
            selection.aim([k])
            aimed = True
    return selection.finish()[0]


def order_statistics(tensor: TensorStream, score: Score, positions: Sequence[int]) -> list[float]:
    """The scores at the given positions of their ascending order."""
    n = tensor.numel
    if tensor.resident or n <= WHOLE:
        ordered = score(0, *tensor.read(0, n)).reshape(-1).sort().values
        return [float(ordered[p]) for p in positions]
    found = []
    for rule in largest(tensor, score, [max(1, min(n - 1, n - p)) for p in positions]):
        assert isinstance(rule, Threshold)
        wide = tensor.compute == torch.float64
        found.append(float(struct.unpack("d" if wide else "f", struct.pack("q" if wide else "i", rule.key))[0]))
    return found

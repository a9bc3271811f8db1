"""Exact thresholds of tensors that pass by in pieces, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .. import _native
from ._checks import per_model, require_like
from .threshold import Rule, Selection, magnitude_key, native_arrays, require_density

SPAN = 512  # elements of one sample span: a read of this size costs about as much as a smaller one
_UNSAMPLED = 1 << 15  # elements up to which everything is collected

Spans = list[tuple[int, int]]


class _Selector(Protocol):
    def sample(self, base: Tensor | None, models: Sequence[Tensor], length: int) -> None: ...
    def feed(self, base: Tensor | None, models: Sequence[Tensor], offset: int, lane: int | None) -> None: ...
    def advance(self) -> Spans: ...
    def aim(self, counts: list[int]) -> None: ...
    def results(self) -> list[tuple[int, int]]: ...


class _NativeSelector:
    def __init__(self, n: int, targets: list[tuple[int, int]], compute: torch.dtype, lanes: int) -> None:
        self._selector = _native.lib().ThresholdSelector(n, targets, compute == torch.float64, lanes)

    def sample(self, base: Tensor | None, models: Sequence[Tensor], length: int) -> None:
        arrays = native_arrays(base, models)
        self._selector.sample(*arrays.arguments, arrays.n, length)

    def feed(self, base: Tensor | None, models: Sequence[Tensor], offset: int, lane: int | None) -> None:
        arrays = native_arrays(base, models)
        if lane is None:
            self._selector.feed(*arrays.arguments, offset, arrays.n, _native.threads())
        else:
            self._selector.feed_lane(*arrays.arguments, offset, arrays.n, lane)

    def advance(self) -> Spans:
        return list(self._selector.advance(_native.threads()))

    def aim(self, counts: list[int]) -> None:
        self._selector.aim(counts)

    def results(self) -> list[tuple[int, int]]:
        return list(self._selector.results())


class _ReferenceSelector:
    """Without the native module: holds the keys of the whole tensor."""

    def __init__(self, n: int, targets: list[tuple[int, int]], compute: torch.dtype, lanes: int) -> None:
        self._n, self._targets, self._compute = n, targets, compute
        self._keys = {model: torch.empty(n, dtype=torch.int64, device="cpu") for model, _ in targets}
        self._fed = False

    def sample(self, base: Tensor | None, models: Sequence[Tensor], length: int) -> None:
        pass

    def feed(self, base: Tensor | None, models: Sequence[Tensor], offset: int, lane: int | None) -> None:
        for i, keys in self._keys.items():
            x = models[i].to(self._compute) if base is None else models[i].to(self._compute) - base.to(self._compute)
            keys[offset : offset + x.numel()] = magnitude_key(x).reshape(-1).cpu()
        self._fed = True

    def advance(self) -> Spans:
        return [] if self._fed else [(0, self._n)]

    def aim(self, counts: list[int]) -> None:
        self._targets = [(model, k) for (model, _), k in zip(self._targets, counts, strict=True)]

    def results(self) -> list[tuple[int, int]]:
        found = []
        for model, k in self._targets:
            keys = self._keys[model]
            last = int(keys.sort(descending=True, stable=True).indices[k - 1])
            found.append((int(keys[last]), last))
        return found


class ThresholdStream:
    """:func:`fastmerge.ops.topk_thresholds` of K deltas over a tensor (or a concatenation of tensors) fed in chunks.

    Usage::

        stream = ThresholdStream(n, density, models=K)
        for start, stop in stream.sample_spans():
            stream.add_sample(base[start:stop], [m[start:stop] for m in models])
        while spans := stream.advance():           # once the whole, then at most small pieces, in all but odd cases
            for start, stop in spans:              # fed whole or in chunks of any size, in any order
                stream.feed(base[start:stop], [m[start:stop] for m in models], start)
        rules = stream.finish()

    Positions are flat indices in the tensor, or in the concatenation; a rule of a concatenation is turned into a tensor's
    own with :meth:`Threshold.shifted`. The sample only decides how much work is done, never the result, and may be left
    out. Without it, or when it misleads, two passes of histograms replace one of collecting.

    Numerics: class A: the rules of topk_thresholds, for any chunks and threads. Memory: about 1 % of n keys and
    positions per model and threshold, at most ``8 · (4·2^20 + n/64)`` bytes. Several threads may call `feed` at once, each
    with a lane of its own; nothing else is thread-safe.
    """

    def __init__(
        self,
        n: int,
        density: float | Sequence[float],
        *,
        models: int,
        gamma: float | Sequence[float] | None = None,
        compute: torch.dtype = torch.float32,
        lanes: int = 1,
    ) -> None:
        """n elements; `gamma` asks for Windows; `compute` is float64 when the base or a model is (see compute_dtype).

        `lanes`: how many threads may feed at once.
        """
        densities = per_model("ThresholdStream", "density", density, models)
        gammas = None if gamma is None else per_model("ThresholdStream", "gamma", gamma, models)
        require_density("ThresholdStream", densities)
        require_density("ThresholdStream", gammas or [], "gamma")
        self.n = n
        self._models = models
        self._selection = Selection(n, densities, gammas)
        kind = _NativeSelector if _native.why_not() is None else _ReferenceSelector
        targets = self._selection.targets
        self._selector: _Selector | None = kind(n, targets, compute, lanes) if targets else None

    def sample_spans(self) -> Spans:
        """Places to sample, spread over the tensor; empty when the tensor is small or nothing is to be selected."""
        if self._selector is None or self.n <= _UNSAMPLED:
            return []
        count = int(max(65536.0, 2.0 * self.n ** (2 / 3))) // SPAN
        count = max(1, min(count, self.n // (4 * SPAN)))
        stride = self.n // count
        # Jitter, so that a stride that divides the row length does not look at the same columns every time.
        return [
            (start, start + SPAN) for i in range(count) for start in [i * stride + (i * 40503) % (stride - SPAN + 1)]
        ]

    def add_sample(self, base: Tensor | None, models: Sequence[Tensor], length: int | None = None) -> None:
        """One span of neighbouring elements, or several of `length` elements each, one after the other."""
        self._check(base, models)
        if self._selector is not None and models[0].numel():
            self._selector.sample(base, models, length or models[0].numel())

    def feed(self, base: Tensor | None, models: Sequence[Tensor], offset: int, *, lane: int | None = None) -> None:
        """The elements from `offset` on, part of a span that `advance` asked for.

        With a lane below `lanes` on the calling thread alone, while other threads may feed other lanes.
        """
        self._check(base, models)
        if self._selector is not None:
            self._selector.feed(base, models, offset, lane)

    def advance(self) -> Spans:
        """The spans to feed before the next call, each element once; empty when `finish` can be called."""
        return [] if self._selector is None else self._selector.advance()

    def aim(self, counts: Sequence[int]) -> None:
        """Keep other numbers of elements than the densities said, one per model, each in [1, n).

        After the whole was fed for the first time and before the next `advance`: for a selection of a share of something
        that the same pass counts. Not for Windows, nor where a density kept all or nothing. Counts near those of the
        densities cost nothing, others two passes more.
        """
        selection = self._selection
        if selection.windows or len(selection.targets) != self._models or any(not 0 < k < self.n for k in counts):
            raise ValueError(f"ThresholdStream: {list(counts)} can not be aimed at")
        selection.counts = [(k,) for k in counts]
        if self._selector is not None:
            self._selector.aim(list(counts))

    def finish(self) -> list[Rule]:
        """One rule per model."""
        return self._selection.rules([] if self._selector is None else self._selector.results())

    def _check(self, base: Tensor | None, models: Sequence[Tensor]) -> None:
        if len(models) != self._models:
            raise ValueError(f"ThresholdStream: {len(models)} models, expected {self._models}")
        require_like("ThresholdStream", base if base is not None else models[0], models)

"""Magnitude thresholds: an exact top-k selection as a rule for one element.

The key of a value is the integer of its absolute value's bits in the compute dtype (float32: ``bits & 0x7fffffff``), every
NaN counting as one key above Inf. Keys order as magnitudes do, so "the k largest, ties to the lowest index" is a pair
(key, index), and whether an element is kept depends on that pair and the element alone: any chunk, thread, shard or
worker decides it the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from .._dispatch import _from_foreign
from ._checks import compute_dtype, per_model, require_float, require_like

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_MAGNITUDE = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}
NAN_KEY = {torch.float32: 0x7FC00000, torch.float64: 0x7FF8000000000000}


class Threshold(NamedTuple):
    """Keep element i when ``key(x[i]) > key``, or they are equal and ``i <= index`` (flat index in the whole tensor)."""

    key: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which no one needs

    def shifted(self, offset: int) -> Threshold:
        """The same rule for elements counted from `offset`: a tensor's own rule out of one for a concatenation."""
        return Threshold(self.key, self.index - offset)


class Window(NamedTuple):
    """Keep an element that `low` keeps and `high` does not (None keeps everything): a band of magnitudes."""

    low: Threshold | None
    high: Threshold | None


Rule = Threshold | Window | None  # None keeps everything
KEEP_NONE = Threshold(2**63 - 1, -1)


def magnitude_key(x: Tensor) -> Tensor:
    """int64 keys of a float32 or float64 tensor (16-bit ones are widened first)."""
    x = x.to(compute_dtype(x)).resolve_neg()
    bits = (x.contiguous().view(_BITS[x.dtype]) & _MAGNITUDE[x.dtype]).long()
    return torch.where(x.isnan(), NAN_KEY[x.dtype], bits)


def kept(x: Tensor, rule: Rule, offset: int = 0) -> Tensor:
    """bool mask of x's shape: the elements a rule keeps, x being elements [offset, offset + numel) of the tensor."""
    if rule is None:
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    if isinstance(rule, Window):
        return kept(x, rule.low, offset) & ~kept(x, rule.high or KEEP_NONE, offset)
    key = magnitude_key(x)
    index = torch.arange(offset, offset + x.numel(), device=x.device).view(x.shape)
    return (key > rule.key) | ((key == rule.key) & (index <= rule.index))


def require_density(op: str, density: Sequence[float], name: str = "density") -> None:
    """Raises ValueError unless every density lies in [0, 1]."""
    for d in density:
        if not 0.0 <= d <= 1.0:
            raise ValueError(f"{op}: {name} {d} is not in [0, 1] (it is the fraction that is kept)")


def kept_count(density: float, n: int) -> int:
    """k = int(density · n) in double precision, at least 1 when density > 0 (0 for an empty tensor)."""
    return min(n, max(1, int(density * n))) if density > 0 and n > 0 else 0


def window_counts(density: float, gamma: float, n: int) -> tuple[int, int]:
    """(k of the low, k of the high threshold): drop the int(gamma·n) largest, keep the next int(density·n).

    Where those are more than n, fewer large ones are dropped. density = 1 keeps everything.
    """
    if density >= 1.0:
        return n, 0
    keep = int(density * n)
    top = min(int(gamma * n), n - keep)
    # Everything dropped from the top is nothing kept; a high end that "keeps everything" could not say so.
    return (0, 0) if top >= n else (keep + top, top)


def _threshold(key: Tensor, k: int) -> Threshold | None:
    """The rule that keeps k of the keys [n], by a stable sort: None for all, KEEP_NONE for none."""
    if k == 0:
        return KEEP_NONE
    if k >= key.numel():
        return None
    last = int(key.sort(descending=True, stable=True).indices[k - 1])
    return Threshold(int(key[last]), last)


def reference_thresholds(
    base: Tensor | None, models: Sequence[Tensor], density: Sequence[float], gamma: Sequence[float] | None = None
) -> list[Rule]:
    """One rule per model for its delta (or for the model itself without a base), in plain PyTorch."""
    compute = compute_dtype(*models, *([] if base is None else [base]))
    rules: list[Rule] = []
    for i, m in enumerate(models):
        delta = m.to(compute) if base is None else m.to(compute) - base.to(compute)
        key = magnitude_key(delta).reshape(-1)
        if gamma is None:
            rules.append(_threshold(key, kept_count(density[i], key.numel())))
            continue
        low, high = window_counts(density[i], gamma[i], key.numel())
        rules.append(Window(_threshold(key, low), _threshold(key, high)))
    return rules


def topk_thresholds(
    base: Tensor | None,
    models: Sequence[Tensor],
    density: float | Sequence[float],
    *,
    gamma: float | Sequence[float] | None = None,
) -> list[Rule]:
    """Exact magnitude thresholds of K deltas, reading the base once for all models.

    Args:
        base: [...] or None (then the models are the deltas).
        models: K tensors of base's shape; dtypes may differ, deltas are taken in float32 (float64 when an input is).
        density: fraction kept, one number or one per model; see :func:`kept_count`.
        gamma: fraction of largest magnitudes to drop first; given, the result holds Windows (:func:`window_counts`).

    Returns: per model a Threshold, a Window when gamma is given, or None when everything is kept.
    Numerics: class A. Raises: TypeError, ValueError as :func:`fastmerge.ops.consensus_merge`.
    """
    base, models = _from_foreign(base), _from_foreign(models)
    if not models:
        raise ValueError("topk_thresholds: models is empty")
    if base is not None:
        require_float("topk_thresholds", base=base)
    require_like("topk_thresholds", base if base is not None else models[0], models)
    densities = per_model("topk_thresholds", "density", density, len(models))
    require_density("topk_thresholds", densities)
    gammas = None if gamma is None else per_model("topk_thresholds", "gamma", gamma, len(models))
    if gammas is not None:
        require_density("topk_thresholds", gammas, "gamma")
    if _native.cpu_why_not(*models, *([] if base is None else [base])) is not None:
        return reference_thresholds(base, models, densities, gammas)
    selection = Selection(models[0].numel(), densities, gammas)
    arrays = native_arrays(base, models)
    found = _native.lib().topk_thresholds(*arrays.arguments, arrays.n, selection.targets, _native.threads())
    return selection.rules(found if selection.targets else [])


class NativeArrays(NamedTuple):
    """Base and models as the native kernels take them; `keep` holds the dense copies alive."""

    arguments: tuple[int, int, list[int], list[int]]
    n: int
    keep: tuple[Tensor, ...]


def native_arrays(base: Tensor | None, models: Sequence[Tensor]) -> NativeArrays:
    dense = [m.resolve_neg().contiguous() for m in models]
    origin = None if base is None else base.resolve_neg().contiguous()
    # A base without elements has a null address, which means "no base": nothing is read then either way.
    first = (0, 0) if origin is None else (origin.data_ptr(), _native.DTYPES[origin.dtype])
    arguments = (*first, [m.data_ptr() for m in dense], [_native.DTYPES[m.dtype] for m in dense])
    return NativeArrays(arguments, dense[0].numel(), (*dense, *([] if origin is None else [origin])))


class Selection:
    """K models' densities as the (model, k) targets of a native selection, and its answers as rules."""

    def __init__(self, n: int, densities: Sequence[float], gammas: Sequence[float] | None) -> None:
        self.n = n
        self.windows = gammas is not None
        self.counts = (
            [(kept_count(d, n),) for d in densities]
            if gammas is None
            else [window_counts(d, g, n) for d, g in zip(densities, gammas, strict=True)]
        )
        self.targets = [(i, k) for i, ks in enumerate(self.counts) for k in ks if 0 < k < n]

    def rules(self, found: Sequence[tuple[int, int]]) -> list[Rule]:
        """One rule per model out of the targets' (key, index) pairs."""
        pairs = iter(found)
        rules: list[Rule] = []
        for ks in self.counts:
            ends = [KEEP_NONE if k == 0 else None if k >= self.n else Threshold(*next(pairs)) for k in ks]
            rules.append(Window(ends[0], ends[1]) if self.windows else ends[0])
        return rules

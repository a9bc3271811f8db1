"""consensus_merge's arguments, checked and resolved to one record per model: what every backend starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import compute_dtype, per_model, require_float, require_like
from .philox import draw_key, draw_limit
from .random_mask import check_random, rank_limits, row_length
from .threshold import KEEP_NONE, Rule, Threshold, Window, require_density

OP = "consensus_merge"
TRIMS = ("topk", "window", "random", "rank_random", None)
ELECTS = ("sum", "count", None)
RESCALES = (None, "l1", "density")


@dataclass(frozen=True)
class ConsensusPlan:
    """K models' scalars. `rules` is None until thresholds are known; `factors` is None until l1 norms are."""

    trim: str | None
    weights: list[float]
    densities: list[float]
    gammas: list[float] | None
    epsilons: list[float]
    rules: list[Rule] | None
    factors: list[float] | None
    divisor: float  # of a merge without election; 1.0 unless normalising
    key: tuple[int, int]
    compute: torch.dtype

    @property
    def selects(self) -> bool:
        return self.trim in ("topk", "window")


def native_trims(
    plan: ConsensusPlan, x: Tensor, rules: Sequence[Rule] | None, factors: Sequence[float]
) -> list[tuple[Any, ...]]:
    """The models' trims as csrc/common/consensus.h takes them; x gives the row length."""
    trims: list[tuple[Any, ...]] = []
    for i, (w, d, e) in enumerate(zip(plan.weights, plan.densities, plan.epsilons, strict=True)):
        low, high, kind, limits = (0, 2**63 - 1), KEEP_NONE, 0, (0, 0, 1)
        if plan.trim in ("random", "rank_random"):
            ranked = e > 0.0 and 0.0 < d < 1.0
            kind, limits = (2, rank_limits(d, e, row_length(x))) if ranked else (1, (draw_limit(d), 0, 1))
        elif rules is not None and rules[i] is not None:
            rule = rules[i]
            ends = rule if isinstance(rule, Window) else (rule, None)
            low, high = ends[0] or low, ends[1] or high
        trims.append((kind, *low, *high, *limits, w, w * factors[i]))
    return trims


def _choice(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{OP}: {name} {value!r} is not one of {', '.join(map(repr, allowed))}")


def make_plan(
    base: Tensor | None,
    models: Sequence[Tensor],
    weight: float | Sequence[float] | Tensor,
    density: float | Sequence[float],
    *,
    trim: str | None,
    gamma: float | Sequence[float],
    epsilon: float | Sequence[float],
    elect: str | None,
    normalize: bool,
    rescale: str | None,
    factors: Sequence[float] | None,
    thresholds: Sequence[Rule] | None,
    seed: int,
    name: str,
    offset: int,
) -> ConsensusPlan:
    """Validates every argument (ValueError, TypeError naming it) and resolves scalars to one per model."""
    if not models:
        raise ValueError(f"{OP}: models is empty")
    if base is not None:
        require_float(OP, base=base)
    require_like(OP, base if base is not None else models[0], models)
    _choice("trim", trim, TRIMS)
    _choice("elect", elect, ELECTS)
    _choice("rescale", rescale, RESCALES)
    count = len(models)
    weights = per_model(OP, "weight", weight, count)
    densities = per_model(OP, "density", density, count) if trim is not None else [1.0] * count
    gammas = per_model(OP, "gamma", gamma, count) if trim == "window" else None
    epsilons = per_model(OP, "epsilon", epsilon, count) if trim == "rank_random" else [0.0] * count
    require_density(OP, densities)
    require_density(OP, gammas or [], "gamma")
    if offset < 0:
        raise ValueError(f"{OP}: offset {offset} is negative")
    for i, (m, d, e) in enumerate(zip(models, densities, epsilons, strict=True)):
        check_random(OP, m, d, e, i, offset)
    rules = _checked_rules(thresholds, trim, count, offset)
    if trim is None or (trim == "topk" and all(d == 1.0 for d in densities) and rules is None):
        rules = [None] * count
    if factors is not None:
        resolved: list[float] | None = per_model(OP, "factors", list(factors), count)
    elif rescale == "density":
        resolved = [1.0 / d if d > 0 else 1.0 for d in densities]
    else:
        resolved = None if rescale == "l1" and trim is not None else [1.0] * count
    total = 0.0
    for w in weights:
        total += w
    return ConsensusPlan(
        trim=trim,
        weights=weights,
        densities=densities,
        gammas=gammas,
        epsilons=epsilons,
        rules=rules,
        factors=resolved,
        divisor=total if normalize and abs(total) >= 1e-8 else 1.0,
        key=draw_key(seed, name),
        compute=compute_dtype(*models, *([] if base is None else [base])),
    )


def _checked_rules(thresholds: Sequence[Rule] | None, trim: str | None, count: int, offset: int) -> list[Rule] | None:
    if thresholds is None:
        if offset and trim in ("topk", "window"):
            raise ValueError(f"{OP}: a chunk (offset {offset}) needs the whole tensor's thresholds")
        return None
    if trim not in ("topk", "window"):
        raise ValueError(f"{OP}: thresholds need trim 'topk' or 'window', not {trim!r}")
    if len(thresholds) != count:
        raise ValueError(f"{OP}: thresholds has {len(thresholds)} entries for {count} models")
    for i, rule in enumerate(thresholds):
        if rule is not None and not isinstance(rule, (Threshold, Window)):
            raise TypeError(f"{OP}: thresholds[{i}] must be a Threshold, a Window or None, not {type(rule).__name__}")
    return list(thresholds)

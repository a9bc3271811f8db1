"""consensus_merge's plan as a job of triton_kernels/consensus_merge.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _triton
from ._consensus_plan import ConsensusPlan
from .philox import draw_limit
from .random_mask import rank_limits, row_length, row_ranks
from .threshold import KEEP_NONE, Rule, Threshold, Window, kept_count, window_counts


def _pair(rule: Threshold | None, otherwise: tuple[int, int]) -> tuple[int, int]:
    return otherwise if rule is None else (rule.key, rule.index)


def _four(rule: Rule) -> tuple[int, int, int, int]:
    """Low and high (key, index): an element is kept where low keeps it and high does not."""
    low = rule.low if isinstance(rule, Window) else rule
    high = rule.high if isinstance(rule, Window) else None
    return *_pair(low, (-1, 0)), *_pair(high, (KEEP_NONE.key, KEEP_NONE.index))


def _masks(base: Tensor | None, models: Sequence[Tensor], plan: ConsensusPlan, offset: int) -> list[Tensor]:
    """Byte masks, for draws by rank and for chunks that start inside a Philox call."""
    masks = []
    for i, (m, density, epsilon) in enumerate(zip(models, plan.densities, plan.epsilons, strict=True)):
        ranked = epsilon > 0.0 and 0.0 < density < 1.0 and m.numel() > 0
        ranks = None
        limits = (draw_limit(density), 0, 1)
        if ranked:
            limits = rank_limits(density, epsilon, row_length(m))
            ranks = row_ranks(m.to(plan.compute) if base is None else m.to(plan.compute) - base.to(plan.compute))
        mask = torch.empty(m.shape, dtype=torch.bool, device=m.device)
        _triton.kernel("random_mask")(m, mask, limits, key=plan.key, stream=i, offset=offset, ranks=ranks)
        masks.append(mask)
    return masks


def triton_job(
    base: Tensor | None, models: Sequence[Tensor], out: Tensor, plan: ConsensusPlan, elect: str | None,
    normalize: bool, scale: float, offset: int,
) -> Any:  # fmt: skip
    """The job that fills `out`; thresholds and l1 factors that the plan lacks are left to the kernels."""
    n = out.numel()
    trim = {"topk": 1, "window": 2, "random": 3, "rank_random": 4, None: 0}[plan.trim]
    rules: list[tuple[int, int, int, int]] = []
    counts: list[tuple[int, int]] = []
    masks: list[Tensor] = []
    if plan.selects and plan.rules is not None:
        rules = [_four(r) for r in plan.rules]
        trim = 2 if any(isinstance(r, Window) for r in plan.rules) else 0 if not any(plan.rules) else 1
    elif plan.trim == "topk":
        counts = [(kept_count(d, n), 0) for d in plan.densities]
    elif plan.trim == "window":
        counts = [window_counts(d, g, n) for d, g in zip(plan.densities, plan.gammas or [], strict=True)]
        counts = [(low, high if high < n else 0) for low, high in counts]
    elif plan.trim == "rank_random" or (plan.trim == "random" and offset % 8):
        trim, masks = 4, _masks(base, models, plan, offset)
    products = None if plan.factors is None else [w * f for w, f in zip(plan.weights, plan.factors, strict=True)]
    return _triton.kernel("consensus_merge", "Job")(
        base=base, models=models, out=out, weights=plan.weights, coefficients=products, trim=trim,
        elect={"sum": 0, "count": 1, None: 2}[elect], divisor=plan.divisor if normalize else None, scale=scale,
        offset=offset, rules=rules, counts=counts, key=plan.key, limits=[draw_limit(d) for d in plan.densities],
        masks=masks,
    )  # fmt: skip

"""Rescale factors ‖δ‖₁ / ‖δ'‖₁ of trimmed deltas, whole or streamed, the same bits either way.

A sum has a fixed order (docs/numerics.md): blocks of 65536 elements at multiples of 65536 of the tensor's flat index; in
each, 16 lanes add every sixteenth element in order in float64; then the lanes, then the blocks are added in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from ._consensus_plan import ConsensusPlan, make_plan, native_trims
from .random_mask import reference_mask, row_length
from .threshold import Rule, kept, native_arrays

SUM_BLOCK = 65536
_LANES = 16
_FLOOR = 1e-7  # below it a norm counts as zero and the model is left alone


def l1_factor(whole: float, kept_part: float) -> float:
    """‖δ‖₁ / ‖δ'‖₁, or 1 where either is below 1e-7."""
    return 1.0 if whole < _FLOOR or kept_part < _FLOOR else whole / kept_part


def block_sums(x: Tensor) -> Tensor:
    """Σ|x| of each block, float64 [blocks], x being elements from a multiple of 65536 on."""
    flat = x.detach().reshape(-1).double().abs()
    blocks = -(-flat.numel() // SUM_BLOCK)
    padded = torch.zeros(blocks * SUM_BLOCK, dtype=torch.float64, device=x.device)
    padded[: flat.numel()] = flat
    lanes = padded.view(blocks, SUM_BLOCK // _LANES, _LANES).cumsum(1)[:, -1]
    return lanes.cumsum(1)[:, -1]


def keep_mask(plan: ConsensusPlan, i: int, delta: Tensor, rules: Sequence[Rule] | None, offset: int) -> Tensor:
    """Model i's trim mask in plain PyTorch."""
    if plan.trim in ("random", "rank_random"):
        return reference_mask(delta, plan.densities[i], epsilon=plan.epsilons[i], key=plan.key, stream=i, offset=offset)
    return kept(delta, rules[i] if rules else None, offset)


def reference_sums(
    plan: ConsensusPlan, base: Tensor | None, models: Sequence[Tensor], rules: Sequence[Rule] | None, offset: int
) -> Tensor:
    pairs = []
    for i, m in enumerate(models):
        delta = m.to(plan.compute) if base is None else m.to(plan.compute) - base.to(plan.compute)
        mask = keep_mask(plan, i, delta, rules, offset)
        pairs.append(torch.stack([block_sums(delta), block_sums(torch.where(mask, delta, 0.0))], dim=1))
    return torch.stack(pairs, dim=1).cpu()


def delta_sums(
    plan: ConsensusPlan, base: Tensor | None, models: Sequence[Tensor], rules: Sequence[Rule] | None, offset: int
) -> Tensor:
    """Per block, model and (whole, kept): Σ|δ|, float64 [blocks, K, 2] on the CPU; the offset is a multiple of 65536."""
    if _native.cpu_why_not(*models, *([] if base is None else [base])) is not None:
        return reference_sums(plan, base, models, rules, offset)
    arrays = native_arrays(base, models)
    sums = torch.empty((-(-arrays.n // SUM_BLOCK), len(models), 2), dtype=torch.float64, device="cpu")
    trims = native_trims(plan, models[0], rules, [1.0] * len(models))
    row = max(1, row_length(models[0]))
    _native.lib().delta_l1(
        sums.data_ptr(), *arrays.arguments, arrays.n, trims, row, *plan.key, offset, _native.threads()
    )
    return sums


def factors_of(sums: Sequence[Tensor], count: int) -> list[float]:
    """One factor per model from blocks in order."""
    if not sums:
        return [1.0] * count
    totals = torch.cat(list(sums)).cumsum(0)[-1].tolist() if sum(len(s) for s in sums) else [[0.0, 0.0]] * count
    return [l1_factor(whole, part) for whole, part in totals]


class L1Stream:
    """The factors of consensus_merge(rescale="l1") for a tensor that passes by in chunks.

    Takes the arguments of :func:`fastmerge.ops.consensus_merge` that decide the trim. Chunks start at multiples of 65536
    elements (and, by rank, at rows) and may come in any order, each once. Memory: 16 bytes per model and 65536 elements.
    """

    def __init__(
        self,
        *,
        trim: str | None,
        density: float | Sequence[float] = 1.0,
        epsilon: float | Sequence[float] = 0.0,
        thresholds: Sequence[Rule] | None = None,
        seed: int = 0,
        name: str = "",
    ) -> None:
        if trim in ("topk", "window") and thresholds is None:
            raise ValueError(f"L1Stream: trim {trim!r} needs the tensor's thresholds")
        self._trim, self._density, self._epsilon = trim, density, epsilon
        self._thresholds, self._seed, self._name = thresholds, seed, name
        self._sums: dict[int, Tensor] = {}

    def feed(self, base: Tensor | None, models: Sequence[Tensor], offset: int) -> None:
        """Adds the chunk that starts at flat index `offset`."""
        if offset % SUM_BLOCK:
            raise ValueError(f"L1Stream: offset {offset} is not a multiple of {SUM_BLOCK}")
        plan = make_plan(
            base, models, 1.0, self._density, trim=self._trim, gamma=0.0, epsilon=self._epsilon, elect=None,
            normalize=False, rescale="l1", factors=None, thresholds=self._thresholds, seed=self._seed, name=self._name,
            offset=offset,
        )  # fmt: skip
        self._sums[offset] = delta_sums(plan, base, models, plan.rules, offset)

    def finish(self) -> list[float]:
        """‖δ‖₁ / ‖δ'‖₁ per model."""
        ordered = [self._sums[offset] for offset in sorted(self._sums)]
        return factors_of(ordered, ordered[0].shape[1] if ordered else 0)

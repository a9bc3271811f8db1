"""What DARE, breadcrumbs and DELLA share: scan for thresholds and factors, then one fused consensus merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .. import ops
from ..ops.threshold import Rule
from ._method import Context, TensorStream
from ._thresholds import found_by_kernels, l1_factors, tensor_thresholds

Trim = Literal["random", "window", "rank_random"]


@dataclass(frozen=True)
class Scanned:
    """Rules of magnitude trims and factors of the L1 rescale, of one whole tensor; None where the merge finds them."""

    rules: list[Rule] | None
    factors: list[float] | None


def scan(tensor: TensorStream, trim: Trim) -> Scanned:
    """The passes a trim needs before it is applied: none for DARE without L1 rescale, up to two for the others."""
    p = tensor.parameters
    l1 = p["rescale"] and p["rescale_norm"] == "l1"
    if found_by_kernels(tensor, trim=trim, rescale="l1" if l1 else None):
        return Scanned(None, None)
    rules = tensor_thresholds(tensor, p["density"], p["gamma"]) if trim == "window" else None
    if not l1:
        return Scanned(rules, None)
    epsilon = p["epsilon"] if trim == "rank_random" else 0.0
    return Scanned(
        rules,
        l1_factors(
            tensor,
            trim=trim,
            density=p["density"],
            epsilon=epsilon,
            thresholds=rules,
            seed=tensor.seed,
            name=tensor.name,
        ),
    )


def merge(
    base: Tensor,
    models: Sequence[Tensor],
    context: Context,
    *,
    trim: Trim,
    elect: Literal["sum", "count"] | None,
    weight: float | Sequence[float],
    density: float | Sequence[float],
    normalize: bool,
    rescale: bool,
    rescale_norm: str,
    lambda_: float,
    gamma: Sequence[float] | float = 0.0,
    epsilon: Sequence[float] | float = 0.0,
) -> Tensor:
    """One chunk of :func:`fastmerge.ops.consensus_merge` with what `scan` found for the whole tensor."""
    scanned: Scanned = context.state
    out: Tensor = ops.consensus_merge(
        base, models, weight, density,
        trim=trim, gamma=gamma, epsilon=epsilon, elect=elect, normalize=normalize,
        rescale=rescale_norm if rescale and scanned.factors is None else None,
        factors=scanned.factors, scale=lambda_, thresholds=scanned.rules,
        seed=context.seed, name=context.name, offset=context.offset, dtype=context.dtype, out=context.out,
    )  # fmt: skip
    return out


def scanner(trim: Trim) -> Any:
    """The scan pass of a method that trims so."""
    return lambda tensor, plan: scan(tensor, trim)

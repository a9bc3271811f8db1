from __future__ import annotations

from typing import Literal

from . import _trimmed
from ._method import Context, Density, Models, PerModel, Weight, method


@method(paper="arXiv:2311.03099", grain="element", one_call=True)
def dare_linear(
    base: Weight,
    models: Models,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_norm: Literal["l1", "density"] = "l1",
    lambda_: float = 1.0,
    context: Context,
) -> Weight:
    """DARE: keep each delta element with probability `density`, rescale what is kept, add the weighted sum to the base.

    `rescale_norm`: "l1" restores the delta's L1 norm (mergekit's way), "density" divides by the density (the paper's).
    Which elements are kept depends on (seed, tensor name, model, position) only.
    """
    return _trimmed.merge(
        base, models, context, trim="random", elect=None, weight=weight, density=density, normalize=normalize,
        rescale=rescale, rescale_norm=rescale_norm, lambda_=lambda_,
    )  # fmt: skip


@method(paper="arXiv:2311.03099", grain="element", one_call=True)
def dare_ties(
    base: Weight,
    models: Models,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_norm: Literal["l1", "density"] = "l1",
    lambda_: float = 1.0,
    context: Context,
) -> Weight:
    """DARE with TIES' sign election: random trim, rescale, elect a sign per element, sum the deltas that agree."""
    return _trimmed.merge(
        base, models, context, trim="random", elect="sum", weight=weight, density=density, normalize=normalize,
        rescale=rescale, rescale_norm=rescale_norm, lambda_=lambda_,
    )  # fmt: skip


dare_linear.scan(_trimmed.scanner("random"))
dare_ties.scan(_trimmed.scanner("random"))

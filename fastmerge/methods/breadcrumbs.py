from __future__ import annotations

from typing import Literal

from . import _trimmed
from ._method import Context, Density, Models, PerModel, Weight, method


@method(paper="arXiv:2312.06795", grain="element", one_call=True, reads=3)
def breadcrumbs(
    base: Weight,
    models: Models,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = 1.0,
    gamma: PerModel[Density] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    rescale_norm: Literal["l1", "density"] = "l1",
    lambda_: float = 1.0,
    context: Context,
) -> Weight:
    """Model breadcrumbs: drop the largest `gamma` fraction of each delta, keep the next `density` fraction, sum, add.

    Magnitudes are ranked over each tensor; ties go to the lowest index.
    """
    return _trimmed.merge(
        base, models, context, trim="window", elect=None, weight=weight, density=density, gamma=gamma,
        normalize=normalize, rescale=rescale, rescale_norm=rescale_norm, lambda_=lambda_,
    )  # fmt: skip


@method(paper="arXiv:2312.06795", grain="element", one_call=True, reads=3)
def breadcrumbs_ties(
    base: Weight,
    models: Models,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = 1.0,
    gamma: PerModel[Density] = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    rescale_norm: Literal["l1", "density"] = "l1",
    lambda_: float = 1.0,
    context: Context,
) -> Weight:
    """Breadcrumbs with TIES' sign election: drop both tails, elect a sign per element, sum the deltas that agree."""
    return _trimmed.merge(
        base, models, context, trim="window", elect="sum", weight=weight, density=density, gamma=gamma,
        normalize=normalize, rescale=rescale, rescale_norm=rescale_norm, lambda_=lambda_,
    )  # fmt: skip


breadcrumbs.scan(_trimmed.scanner("window"))
breadcrumbs_ties.scan(_trimmed.scanner("window"))

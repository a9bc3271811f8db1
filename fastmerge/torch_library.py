# ruff: noqa: UP045 (torch.library reads Optional from annotations on every version that is supported)
"""torch.ops.fastmerge.*: operators whose schema torch can hold, for torch.compile, export and graph tools.

Importing this module registers them. They are shells: dispatch, checks and kernels are those of :mod:`fastmerge.ops`, and a
fake implementation gives torch the shapes. consensus_merge and others that take thresholds or plans are not here.

    import fastmerge.torch_library
    merged = torch.ops.fastmerge.weighted_sum(base, models, [0.5, 0.5], False, 1.0)

None has a formula for gradients: use :mod:`fastmerge.ops`, whose reference torch can differentiate.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import ops


@torch.library.custom_op("fastmerge::topk_mask", mutates_args=())
def topk_mask(x: Tensor, density: float, dim: Optional[int] = None) -> Tensor:
    """:func:`fastmerge.ops.topk_mask`."""
    return ops.topk_mask(x, density, dim=dim)


@topk_mask.register_fake
def _(x: Tensor, density: float, dim: Optional[int] = None) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


@torch.library.custom_op("fastmerge::random_mask", mutates_args=())
def random_mask(
    x: Tensor, density: float, epsilon: float = 0.0, seed: int = 0, name: str = "", stream: int = 0, offset: int = 0
) -> Tensor:
    """:func:`fastmerge.ops.random_mask` without rescaling."""
    return ops.random_mask(x, density, epsilon=epsilon, seed=seed, name=name, stream=stream, offset=offset)


@random_mask.register_fake
def _(
    x: Tensor, density: float, epsilon: float = 0.0, seed: int = 0, name: str = "", stream: int = 0, offset: int = 0
) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


@torch.library.custom_op("fastmerge::weighted_sum", mutates_args=())
def weighted_sum(
    base: Optional[Tensor],
    models: list[Tensor],
    weight: list[float],
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """:func:`fastmerge.ops.weighted_sum`, in base's dtype (without one the first model's)."""
    return ops.weighted_sum(base, models, weight, normalize=normalize, scale=scale)


@weighted_sum.register_fake
def _(
    base: Optional[Tensor],
    models: list[Tensor],
    weight: list[float],
    normalize: bool = False,
    scale: float = 1.0,
) -> Tensor:
    like = models[0] if base is None else base
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@torch.library.custom_op("fastmerge::highpass_filter", mutates_args=())
def highpass_filter(
    x: Tensor,
    cutoff: Optional[float] = None,
    mask: str = "radial",
    ring_double: bool = False,
) -> Tensor:
    """:func:`fastmerge.ops.highpass_filter`."""
    return ops.highpass_filter(x, cutoff, mask=mask, ring_double=ring_double)


@highpass_filter.register_fake
def _(
    x: Tensor,
    cutoff: Optional[float] = None,
    mask: str = "radial",
    ring_double: bool = False,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("fastmerge::pearson", mutates_args=())
def pearson(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """:func:`fastmerge.ops.pearson`."""
    return ops.pearson(a, b, eps=eps)


@pearson.register_fake
def _(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return torch.empty((a.shape[0], b.shape[0]), dtype=wide, device=a.device)

"""topk_mask: which elements are among the k largest magnitudes, exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import op
from ._checks import require_float
from .threshold import (
    KEEP_NONE,
    Rule,
    Threshold,
    Window,
    kept,
    kept_count,
    magnitude_key,
    require_density,
)

__all__ = ["KEEP_NONE", "Threshold", "Window", "topk_mask"]


def _validated_dim(x: Tensor, density: float, dim: int | None, out: Tensor | None) -> int | None:
    """Raises for bad input; returns dim counted from the front, None for the whole tensor (0-d has one row)."""
    require_float("topk_mask", x=x)
    require_density("topk_mask", [density])
    if out is not None and (out.dtype != torch.bool or out.shape != x.shape or out.device != x.device):
        raise ValueError(
            f"topk_mask: out is {out.dtype}, {tuple(out.shape)} on {out.device}; a bool tensor of x's shape and device is needed"
        )
    if dim is None or x.ndim == 0:
        return None
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"topk_mask: dim {dim} is out of range for a tensor of {x.ndim} dimensions")
    return dim % x.ndim


def _result(mask: Tensor, out: Tensor | None) -> Tensor:
    return mask if out is None or out is mask else out.copy_(mask)


@op(numerics="A", kind="selection")
def topk_mask(x: Tensor, density: float, *, dim: int | None = None, out: Tensor | None = None) -> Tensor:
    """The mask of the k largest absolute values, ties to the lowest index.

    ``k = int(density · n)`` in double precision, at least 1 when density > 0; n is the number of elements, or the length
    of `dim`, along which every row is then masked by itself. NaN sorts above Inf, and −0 equals 0.

    Args:
        x: [...] float32, float64, float16 or bfloat16; any strides.
        density: fraction kept, in [0, 1].
        dim: None for the whole tensor, else the dimension of the rows.
        out: bool tensor of x's shape, filled and returned when given: a new one costs the first touch of its pages.

    Returns: bool, x's shape, contiguous.
    Numerics: class A: exactly k True on every backend, the same ones.
    Cost: one read of x and one write of n bytes (CPU; two reads where few distinct values make heavy ties); no copy of
        x, no sort; workspace about 2 % of n keys.
    Raises: TypeError for a non-float tensor; ValueError for a density outside [0, 1], a dim out of range, or an out that
        does not fit.
    Source: the trim step of TIES (arXiv:2306.01708), §4.1.
    """
    axis = _validated_dim(x, density, dim, out)
    rows = magnitude_key(x).reshape(1, -1) if axis is None else magnitude_key(x).movedim(axis, -1)
    largest = rows.sort(dim=-1, descending=True, stable=True).indices[..., : kept_count(density, rows.shape[-1])]
    mask = torch.zeros(rows.shape, dtype=torch.bool, device=x.device).scatter_(-1, largest, True)
    return _result(mask.reshape(x.shape) if axis is None else mask.movedim(-1, axis).contiguous(), out)


def rule_mask(x: Tensor, rule: Rule, offset: int = 0) -> Tensor:
    """:func:`fastmerge.ops.threshold.kept`, by the kernel where it runs: x is elements [offset, …) of its tensor."""
    if rule is None or _native.cpu_why_not(x) is not None:
        return kept(x, rule, offset)
    if isinstance(rule, Window):
        mask = rule_mask(x, rule.low, offset)
        return mask if rule.high is None else mask.logical_and_(~rule_mask(x, rule.high, offset))
    dense, mask = x.contiguous(), torch.empty(x.shape, dtype=torch.bool, device="cpu")
    dtype, index = _native.DTYPES[x.dtype], rule.index - offset
    _native.lib().rule_mask(mask.data_ptr(), dense.data_ptr(), dtype, x.numel(), rule.key, index, _native.threads())
    return mask


@topk_mask.backend("cpu", when=lambda x, *_, **__: _native.cpu_why_not(x))
def _topk_mask_cpu(x: Tensor, density: float, *, dim: int | None = None, out: Tensor | None = None) -> Tensor:
    axis = _validated_dim(x, density, dim, out)
    n = x.numel() if axis is None else x.shape[axis]
    k = kept_count(density, n)
    if k in (0, n) or x.numel() == 0:
        return _result((torch.zeros if k == 0 else torch.ones)(x.shape, dtype=torch.bool, device="cpu"), out)
    rows = (x if axis is None else x.movedim(axis, -1)).contiguous()
    mask = (
        out
        if out is not None and axis in (None, x.ndim - 1) and out.is_contiguous()
        else _native.fresh(rows.shape, torch.bool)
    )
    where = mask.data_ptr(), rows.data_ptr(), _native.DTYPES[x.dtype]
    if axis is None:
        _native.lib().topk_mask(*where, n, k, _native.threads())
        return _result(mask, out)
    _native.lib().topk_rows(*where, rows.numel() // n, n, k, _native.threads())
    return _result(mask.movedim(-1, axis).contiguous() if mask is not out else mask, out)


@topk_mask.backend("triton", when=lambda x, *_, **__: _triton.why_not(x))
def _topk_mask_triton(x, density, *, dim=None, out=None):  # type: ignore[no-untyped-def]
    axis = _validated_dim(x, density, dim, out)
    rows = x.reshape(1, -1) if axis is None else x.movedim(axis, -1)
    flat = rows.reshape(-1, rows.shape[-1]) if rows.numel() else rows.reshape(0, 1)
    made = torch.empty(flat.shape, dtype=torch.bool, device=x.device)
    mask = _triton.kernel("topk_mask")(flat, kept_count(density, rows.shape[-1]), made).view(rows.shape)
    return _result(mask.reshape(x.shape) if axis is None else mask.movedim(-1, axis).contiguous(), out)


@topk_mask.case("normal, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(263, 517, generator=g).to(dtype), 0.2), {}


@topk_mask.case("heavy ties")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return ((torch.randint(-3, 4, (70001,), generator=g) / 8).to(dtype), 0.4), {}


@topk_mask.case("constant")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.full((300, 301), -0.5, dtype=dtype), 0.37), {}


@topk_mask.case("rows")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(5, 7, 331, generator=g).to(dtype), 0.1), {"dim": -1}


@topk_mask.case("rows with ties, another dimension")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randint(-2, 3, (401, 6), generator=g).to(dtype), 0.3), {"dim": 0}


@topk_mask.case("special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    inf, nan = float("inf"), float("nan")
    return (torch.tensor([0.0, -0.0, -inf, nan, 1e-40, 2.0, inf, nan, -2.0, nan]).to(dtype), 0.5), {}


@topk_mask.case("more NaN than places")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x = torch.randn(9001, generator=g)
    x[torch.rand(9001, generator=g) < 0.5] = float("nan")
    return (x.to(dtype), 0.25), {}


@topk_mask.case("subnormal")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return ((torch.randn(5000, generator=g) * 1e-39).to(dtype), 0.3), {}


@topk_mask.case("keeps none", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(100, generator=g).to(dtype), 0.0), {}


@topk_mask.case("keeps all", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(100, generator=g).to(dtype), 1.0), {}


@topk_mask.case("keeps one of few", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(7, generator=g).to(dtype), 0.01), {}


@topk_mask.case("empty", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.zeros(0, 4, dtype=dtype), 0.5), {}


@topk_mask.case("0-d", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.tensor(3.0, dtype=dtype), 0.5), {}

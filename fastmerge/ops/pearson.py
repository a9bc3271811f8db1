"""pearson: correlations between the rows of two matrices, only the block that is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import op
from ._checks import compute_dtype, require_float

EPS = 1e-7  # smallest product of standard deviations that is divided by (the published value)
COLUMNS = 4096  # width of the panels the products are accumulated over: fixed, so that results do not depend on memory


def _check(a: Tensor, b: Tensor) -> torch.dtype:
    require_float("pearson", a=a, b=b)
    for name, t in (("a", a), ("b", b)):
        if t.ndim != 2:
            raise ValueError(f"pearson: {name} must be a matrix, one row per unit, not of shape {tuple(t.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"pearson: a has {a.shape[1]} features and b has {b.shape[1]}")
    if a.device != b.device:
        raise ValueError(f"pearson: a is on {a.device}, b on {b.device}")
    return compute_dtype(a, b)


@op(numerics="B", kind="reduction")
def pearson(a: Tensor, b: Tensor, *, eps: float = EPS, center: bool = True) -> Tensor:
    """Pearson correlation of every row of `a` with every row of `b`.

    ``out[i, j] = cov(aᵢ, bⱼ) / max(σ(aᵢ)·σ(bⱼ), eps)``, population covariance and deviations over the F features. Rows
    are centred before they are multiplied, so nothing cancels and no variance is negative; a constant row gives 0.

    Args:
        a: [n, F]; b: [m, F].
        center: False gives the cosine (means taken as 0).

    Returns: [n, m], float32 (float64 when an input is float64).
    Numerics: class B: products accumulate over panels of 4096 features, in order; tolerance across devices.
    Cost: one read of a and b twice, 2nmF flops, a workspace of (n + m)·4096 elements.
    Raises: TypeError for non-float tensors, ValueError for shapes or devices that do not fit.
    Source: MuDSC (arXiv:2403.01753), sec. 3; ZipIt (arXiv:2305.03053), sec. 4.
    """
    dtype = _check(a, b)
    features = max(a.shape[1], 1)
    x, y = a.to(dtype), b.to(dtype)
    if center and a.shape[1]:
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    sx, sy = (x.square().sum(1) / features).sqrt(), (y.square().sum(1) / features).sqrt()
    return (x @ y.T / features) / (sx[:, None] * sy[None, :]).clamp(min=eps)


@pearson.backend("torch", when=lambda a, b, **_: None if a.numel() else "a is empty")
def _pearson_panels(a: Tensor, b: Tensor, *, eps: float = EPS, center: bool = True) -> Tensor:
    dtype = _check(a, b)
    features = a.shape[1]
    same = a is b
    out = torch.zeros(a.shape[0], b.shape[0], dtype=dtype, device=a.device)

    def mean(t: Tensor) -> Tensor:
        return t.mean(1, keepdim=True, dtype=torch.float64).to(dtype)

    ma = mean(a) if center else None
    mb = ma if same else mean(b) if center else None
    va = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    vb = va if same else torch.zeros(b.shape[0], dtype=torch.float64, device=a.device)
    for at in range(0, features, COLUMNS):
        x = a[:, at : at + COLUMNS].to(dtype)
        x = x if ma is None else x - ma
        va += torch.linalg.vector_norm(x, dim=1).double().square()
        if same:
            y = x
        else:
            y = b[:, at : at + COLUMNS].to(dtype)
            y = y if mb is None else y - mb
            vb += torch.linalg.vector_norm(y, dim=1).double().square()
        out.addmm_(x, y.T)
    sa, sb = (va / features).sqrt().to(dtype), (vb / features).sqrt().to(dtype)
    return normalise(out.div_(features), sa, sb, eps)


def normalise(covariance: Tensor, sa: Tensor, sb: Tensor, eps: float = EPS) -> Tensor:
    """Correlations from covariances [n, m] (overwritten) and standard deviations [n], [m]."""
    if float(sa.min() * sb.min()) > eps:  # no row is near constant: two sweeps over the block, no third matrix
        return covariance.div_(sa[:, None]).div_(sb[None, :])
    return covariance.div_((sa[:, None] * sb[None, :]).clamp_(min=eps))


@pearson.case("more features than a panel")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(37, 5001, generator=g).to(dtype), torch.randn(41, 5001, generator=g).to(dtype)), {}


@pearson.case("cosine, one feature")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.randn(3, 1, generator=g).to(dtype), torch.randn(5, 1, generator=g).to(dtype)), {"center": False}


@pearson.case("constant rows")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    a = torch.randn(6, 40, generator=g)
    a[2] = 0.5
    return (a.to(dtype), torch.randn(4, 40, generator=g).to(dtype)), {}

"""Euclidean projections onto the simplex, for the coefficients of soft Frank-Wolfe."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput


def project_simplex(v: Tensor, *, total: float = 1.0, dim: int = 0, metric: Tensor | None = None) -> Tensor:
    """The nearest point w to v with w >= 0 and Σ w = `total` along `dim`.

    With u = v sorted down and c its running sum: ρ = the last i with u_i − (c_i − total)/i > 0, τ = (c_ρ − total)/ρ,
    w = max(v − τ, 0). With a `metric` d > 0 of v's shape distances are Σ d(w − v)²: the order is that of d·v, i becomes
    the running sum of 1/d, and w = max(v − τ/d, 0).

    Shapes: any; every line along `dim` is projected by itself. Arithmetic in float64. Cost: O(n log n) a line.
    Raises: BadInput for an empty axis, values that are not finite, or total <= 0.
    Source: Held, Wolfe, Crowder 1974; Duchi et al. 2008, figure 1.
    """
    if v.ndim == 0 or v.shape[dim] == 0:
        raise BadInput(
            f"the simplex needs at least one coefficient, v has shape {list(v.shape)}",
            remedy=f"give a tensor with elements along dim={dim}",
        )
    if total <= 0:
        raise BadInput(
            f"the simplex needs a positive total, not {total}", remedy="leave total= out for coefficients that sum to 1"
        )
    if not bool(torch.isfinite(v).all()):
        raise BadInput("a coefficient is not finite", remedy="lower the learning rate of the coefficients")
    x = v.double().movedim(dim, -1)
    if metric is not None:
        return _project_scaled(x, metric.double().movedim(dim, -1), total).movedim(-1, dim).to(v.dtype)
    u = x.sort(-1, descending=True).values
    excess = u.cumsum(-1) - total
    index = torch.arange(1, x.shape[-1] + 1, dtype=torch.float64, device=x.device)
    rho = ((u - excess / index) > 0).sum(-1, keepdim=True)  # the condition holds exactly for the first rho entries
    tau = excess.gather(-1, rho - 1) / rho
    return (x - tau).clamp(min=0).movedim(-1, dim).to(v.dtype)


def _project_scaled(x: Tensor, d: Tensor, total: float) -> Tensor:
    order = (d * x).argsort(-1, descending=True)
    u, e = x.gather(-1, order), d.gather(-1, order)
    tau = (u.cumsum(-1) - total) / (1 / e).cumsum(-1)
    rho = (u * e > tau).sum(-1, keepdim=True).clamp(min=1)
    return (x - tau.gather(-1, rho - 1) / d).clamp(min=0)


def project_capped(v: Tensor, *, total: float = 1.0, dim: int = 0, metric: Tensor | None = None) -> Tensor:
    """The nearest point to v with w >= 0 and Σ w <= `total`: max(v, 0) where that fits, else :func:`project_simplex`.

    In Frank-Wolfe's terms the current iterate is one more vertex, with the weight that is left over.
    """
    positive = v.clamp(min=0)
    fits = positive.double().sum(dim, keepdim=True) <= total
    return torch.where(fits, positive, project_simplex(v, total=total, dim=dim, metric=metric))

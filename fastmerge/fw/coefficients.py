"""The inner problem of soft Frank-Wolfe: a loss minimised over coefficients w [k, L], each column on its own set."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import BadInput
from .simplex import project_capped, project_simplex

_SHRINK, _GROW, _MOST, _SMALLEST = 0.4, 2.0, 100.0, 1e-10


class Objective(Protocol):
    def __call__(self, w: Tensor) -> tuple[float | None, Tensor]:
        """(loss or None when unknown, gradient [k, L]) at w."""
        ...


def project(w: Tensor, constraint: str, metric: Tensor | None = None) -> Tensor:
    """The nearest allowed coefficients: each column on the simplex, under it, or anywhere."""
    if constraint == "simplex":
        return project_simplex(w, metric=metric)
    return project_capped(w, metric=metric) if constraint == "capped" else w


class Spectral:
    """Spectral projected gradient (Birgin, Martinez, Raydan 2000), kept monotone, in the geometry of the weights.

    A coefficient w_j moves θ by w_j·(s_j − θ), so that lengths of w are measured by D = diag ‖s_j − θ‖²:
    w ← P_D(w − η·D⁻¹∇). Vertices far away and near take steps of one length, where a common step for raw coefficients
    is as small as the farthest vertex needs. η follows Barzilai and Borwein, ⟨Δw, DΔw⟩ / ⟨Δw, Δ∇⟩, and shrinks where the
    loss would rise (the point is then rejected). It is kept from one call to the next; at first it is the inverse of
    the layers' mean ⟨g, θ − s⟩/‖s − θ‖² of the steepest vertex, for which one layer's full step is right.
    """

    def __init__(self) -> None:
        self.size = 0.0

    def __call__(
        self, objective: Objective, w: Tensor, value: float, slope: Tensor, squares: Tensor, steps: int,
        constraint: str, losses: list[float],
    ) -> Tensor:  # fmt: skip
        """w after at most `steps` evaluations; losses of accepted points are added to `losses`."""
        far = squares > 0
        metric = torch.where(far, squares, squares.max() if bool(far.any()) else 1.0)  # s = θ: its gradient is 0
        if not self.size:
            steepest = (slope / metric.sqrt()).abs().argmax(0, keepdim=True)
            curvature = float((slope.abs() / metric).gather(0, steepest).mean())
            self.size = 1 / curvature if curvature > 0 else 1.0
        smallest = self.size * _SMALLEST
        for _ in range(steps):
            moved = project(w - self.size * slope / metric, constraint, metric)
            if torch.equal(moved, w):  # a stationary point of the constrained problem
                break
            found, there = objective(moved)
            assert found is not None
            if not found <= value:
                self.size *= _SHRINK
                if self.size < smallest:
                    break
                continue
            step, bend = moved - w, float(((moved - w) * (there - slope)).sum())
            length = float((metric * step * step).sum())
            self.size = min(length / bend, _MOST * self.size) if bend > 0 else _GROW * self.size
            w, value, slope = moved, found, there
            losses.append(value)
        return w


def minimise(
    objective: Objective, w: Tensor, *, steps: int, optimizer: str, lr: float | None, constraint: str,
    squares: Tensor, spectral: Spectral, known: tuple[float | None, Tensor] | None = None,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """(coefficients, losses on the way), of at most `steps` evaluations of the objective.

    pgd with a fixed lr: w ← P(w − lr·∇), `steps` times. pgd without: `spectral`. adam: torch.optim.Adam,
    projected after each step. `squares` [k, L] are ‖s − θ‖², `known` is the objective at w where that is known already.
    Raises BadInput when a step is to be found from the loss and the loss is unknown.
    """
    first = w
    w = project(w, constraint)
    if steps == 0:
        return w, []
    if optimizer == "adam":
        assert lr is not None
        return _adam(objective, w, steps, lr, constraint)
    losses: list[float] = []
    value, slope = known if known is not None and torch.equal(w, first) else objective(w)
    if value is not None:
        losses.append(value)
    if lr is not None:
        for step in range(steps):
            w = project(w - lr * slope, constraint)
            if step + 1 < steps:  # the gradient after the last step would be thrown away
                value, slope = objective(w)
                if value is not None:
                    losses.append(value)
        return w, losses
    if value is None:
        raise BadInput(
            "without inner_lr the coefficients' step is found from the loss, which this gradient does not tell",
            remedy="pass inner_lr=, or a gradient made by fm.gradient (it sets .value)",
        )
    return spectral(objective, w, value, slope, squares, steps - 1, constraint, losses), losses


def _adam(objective: Objective, w: Tensor, steps: int, lr: float, constraint: str) -> tuple[Tensor, list[float]]:
    parameter = torch.nn.Parameter(w.clone())
    adam = torch.optim.Adam([parameter], lr=lr)
    losses: list[float] = []
    for _ in range(steps):
        value, slope = objective(parameter.detach())
        if value is not None:
            losses.append(value)
        parameter.grad = slope
        adam.step()
        with torch.no_grad():
            parameter.copy_(project(parameter.detach(), constraint))
    return parameter.detach(), losses

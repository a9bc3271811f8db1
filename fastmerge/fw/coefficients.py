"""The inner problem of soft Frank-Wolfe: a loss minimised over coefficients w [k, L], each column on its own set."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import BadInput
from .simplex import project_capped, project_simplex

_SHRINK, _GROW, _SMALLEST = 0.5, 1.5, 1e-10


class Objective(Protocol):
    def __call__(self, w: Tensor) -> tuple[float | None, Tensor]:
        """(loss or None when unknown, gradient [k, L]) at w."""
        ...


def project(w: Tensor, constraint: str) -> Tensor:
    """The nearest allowed coefficients: each column on the simplex, under it, or anywhere."""
    if constraint == "simplex":
        return project_simplex(w)
    return project_capped(w) if constraint == "capped" else w


def minimise(
    objective: Objective, w: Tensor, *, steps: int, optimizer: str, lr: float | None, constraint: str
) -> tuple[Tensor, list[float]]:
    """(coefficients, losses on the way).

    pgd with a fixed lr: w ← P(w − lr·∇), `steps` times. pgd without: the same with a step that halves whenever the loss
    rises (the point is then rejected) and grows by half when it falls; it starts at 1/max|∇|, one move across the set.
    adam: torch.optim.Adam, projected after each step. Raises BadInput when backtracking and the loss is unknown.
    """
    w = project(w, constraint)
    if steps == 0:
        return w, []
    if optimizer == "adam":
        assert lr is not None
        return _adam(objective, w, steps, lr, constraint)
    losses: list[float] = []
    value, slope = objective(w)
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
    steepest = float(slope.abs().max())
    if steepest == 0:
        return w, losses
    size = 1.0 / steepest
    for _ in range(steps - 1):
        moved = project(w - size * slope, constraint)
        if torch.equal(moved, w):  # a stationary point of the constrained problem
            break
        found, there = objective(moved)
        assert found is not None
        if found <= value:
            w, value, slope, size = moved, found, there, size * _GROW
            losses.append(value)
        else:
            size *= _SHRINK
            if size * steepest < _SMALLEST:
                break
    return w, losses


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

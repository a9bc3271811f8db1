"""Step rules: how far to move towards the vertex.

The decaying rules give γ and the vertex is weighted with scale·γ, as published; the searching rules give the weight of
the vertex itself, in [0, 1], because they measure what it does.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BadInput

RULES = ("harmonic", "constant", "line_search", "short")
SEARCHING = ("line_search", "short")


def decaying(rule: str, t: int, step_size: float) -> float:
    """γ of iteration t = 0, 1, ...: 2/(t + 2)·step_size, or step_size."""
    return 2.0 / (t + 2) * step_size if rule == "harmonic" else step_size


def line_search(loss: Callable[[float], float], start: float, *, evaluations: int) -> tuple[float, float]:
    """(γ in [0, 1], loss there) with loss(γ) <= `start` = loss(0): Brent's bounded search, and the end γ = 1.

    γ = 0 when no point tried is better. Cost: `evaluations` + 1 losses.
    """
    from scipy.optimize import minimize_scalar

    tried: list[tuple[float, float]] = [(0.0, start), (1.0, loss(1.0))]

    def remember(gamma: float) -> float:
        value = loss(float(gamma))
        tried.append((float(gamma), value))
        return value

    minimize_scalar(remember, bounds=(0.0, 1.0), method="bounded", options={"maxiter": evaluations, "xatol": 1e-4})
    return min(((g, v) for g, v in tried if v == v), key=lambda found: (found[1], found[0]))


class ShortStep:
    """γ = min(gap / (L·‖s − θ‖²), 1), with a given L or one found by backtracking on the loss.

    Backtracking (Pedregosa et al. 2020, arXiv:1806.05123): L doubles until
    loss(γ) <= loss(0) − γ·gap + γ²·L/2·‖s − θ‖², and shrinks by a tenth between iterations.
    """

    def __init__(self, lipschitz: float | None, loss: object) -> None:
        if lipschitz is not None and not lipschitz > 0:
            raise BadInput(f"lipschitz must be positive, not {lipschitz}")
        if lipschitz is None and loss is None:
            raise BadInput(
                "step='short' needs the loss's smoothness constant, or the loss to find it",
                remedy="pass lipschitz=, or loss=, or a gradient made by fm.gradient",
            )
        self.fixed, self.estimate = lipschitz, 0.0

    def __call__(
        self, gap: float, square: float, start: float | None, loss: Callable[[float], float]
    ) -> tuple[float, float | None]:
        """(γ, loss there if it was evaluated)."""
        if gap <= 0 or square <= 0:
            return 0.0, start
        if self.fixed is not None:
            return min(gap / (self.fixed * square), 1.0), None
        assert start is not None
        smooth = 0.9 * self.estimate or gap / square  # at first: a full step is the largest that could be right
        for _ in range(60):
            gamma = min(gap / (smooth * square), 1.0)
            value = loss(gamma)
            if value <= start - gamma * gap + gamma * gamma * smooth * square / 2:
                self.estimate = smooth
                return gamma, value
            smooth *= 2
        return 0.0, start  # the gradient does not describe the loss at any scale: stay

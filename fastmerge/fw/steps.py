"""Step rules: how far to move towards the vertex.

The decaying rules give γ and the vertex is weighted with scale·γ, as published; the searching rules give the weight of
the vertex itself, in [0, 1], because they measure what it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

from ..errors import BadInput

RULES = ("harmonic", "constant", "line_search", "short")
SEARCHING = ("line_search", "short")
_DOUBLINGS = 60  # of L, at most: a loss of 0 shows every decrease
_SHOWS = 1e-7  # a promised decrease below this share of the loss is lost in float32's rounding


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
    """γ_l = min(gap_l / (L·‖s_l − θ_l‖²), 1) of every block l, with a given L or one found by backtracking on the loss.

    Blocks are the tensors with granularity "layer" (their hulls' product is what is searched), the whole model
    otherwise; where gap_l <= 0 a block stays. The γ minimise the bound
    ℓ(θ) − Σ γ_l·gap_l + L/2·Σ γ_l²‖s_l − θ_l‖², which holds for L large enough. Backtracking (Pedregosa et al. 2020,
    arXiv:1806.05123) doubles L until it does hold, and halves L between iterations. One block whose vertex is of no use
    does not hold up the others.
    """

    def __init__(self, lipschitz: float | None, loss: object) -> None:
        if lipschitz is not None and not lipschitz > 0:
            raise BadInput(
                f"lipschitz must be positive, not {lipschitz}",
                remedy="leave it out and give loss=: then it is found by backtracking",
            )
        if lipschitz is None and loss is None:
            raise BadInput(
                "step='short' needs the loss's smoothness constant, or the loss to find it",
                remedy="pass lipschitz=, or loss=, or a gradient made by fm.gradient",
            )
        self.fixed, self.estimate = lipschitz, 0.0

    def __call__(
        self,
        gaps: Sequence[float],
        squares: Sequence[float],
        start: float | None,
        loss: Callable[[list[float]], float],
    ) -> list[float]:
        """γ of every block from ⟨g, θ − s⟩ and ‖s − θ‖²; all 0 where no step lowers the loss."""
        moving = [g > 0 and q > 0 for g, q in zip(gaps, squares, strict=True)]

        def gammas(smooth: float) -> list[float]:
            found = zip(moving, gaps, squares, strict=True)
            return [min(g / (smooth * q), 1.0) if m else 0.0 for m, g, q in found]

        if not any(moving):
            return [0.0] * len(moving)
        if self.fixed is not None:
            return gammas(self.fixed)
        assert start is not None
        # At first: one full step for all blocks is the largest that could be right.
        smooth = self.estimate / 2 or sum(compress(gaps, moving)) / sum(compress(squares, moving))
        for _ in range(_DOUBLINGS):
            tried = gammas(smooth)
            decrease = sum(y * g - y * y * smooth * q / 2 for y, g, q in zip(tried, gaps, squares, strict=True))
            if loss(tried) <= start - decrease:
                self.estimate = smooth
                return tried
            if not decrease > _SHOWS * abs(start):  # nothing to see at this scale and below; so too for a NaN
                break
            smooth *= 2
        return [0.0] * len(moving)  # the gradient does not describe the loss at any scale: stay

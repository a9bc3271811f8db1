"""What a Frank-Wolfe run returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .trace import Trace


@dataclass
class FrankWolfeResult:
    """The merged weights, and how they came about.

    ``state_dict``: the base's names, shapes and dtypes. ``trace``: every iteration. ``coefficients``: for inner task
    arithmetic and soft merging, per tensor the weights of the start, of each candidate and of the zero vertex; they sum
    to one, and where none is negative the tensor lies in the hull.
    """

    state_dict: dict[str, Tensor]
    trace: Trace
    coefficients: dict[str, list[float]] = field(default_factory=dict)

    @property
    def choices(self) -> list[list[Any]]:
        """Per iteration, the candidate each layer (or the model) moved towards."""
        return [i.choices for i in self.trace.iterations]

    @property
    def gap(self) -> float:
        """The duality gap before the last step."""
        return self.trace.iterations[-1].gap if self.trace.iterations else float("nan")


class Coefficients:
    """Barycentric coordinates of θ per tensor: [start, candidates..., zero vertex]."""

    def __init__(self, names: list[str], candidates: int, start: bool) -> None:
        self.rows = {n: [1.0] + [0.0] * (candidates + 1) for n in names}
        self.start_is = candidates - 1 if start else None  # the start is also the last candidate

    def move(self, name: str, picks: dict[int, float]) -> None:
        """θ ← θ + Σ w_j (s_j − θ)."""
        row = self.rows[name]
        left = 1.0 - sum(picks.values())
        row[:] = [left * w for w in row]
        for k, w in picks.items():
            if k == self.start_is:
                row[0] += w
            else:
                row[1 + k if k >= 0 else -1] += w

"""What a rule of the tracer is: what one ATen operation does to symbolic axes (:mod:`._domain`).

A rule ties axes that must move together, pins those that may not move, and returns the axes of the result. Operations
without a rule of their own: pointwise ones (by torch's own tag) tie their operands; anything else pins its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ._domain import UNIT, Axes, Tree, size

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


class Value:
    """Axes of a tensor; `origin` = (parameter, its axis for each axis of this view) while it is only a view of one."""

    __slots__ = ("dims", "origin")

    def __init__(self, dims: Sequence[Tree], origin: tuple[str, list[int | None]] | None = None) -> None:
        self.dims, self.origin = list(dims), origin


class Context:
    """What rules may use: the axes, and a note of which parameter axes are contracted (role "in")."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.consumed: set[tuple[str, int]] = set()
        self.produced: set[tuple[str, int]] = set()

    def consume(self, value: Value, axis: int) -> None:
        if value.origin is not None:
            name, where = value.origin
            at = where[axis % len(where)]
            if at is not None:
                self.consumed.add((name, at))

    def produce(self, value: Value) -> None:
        if value.origin is not None:
            self.produced.update((value.origin[0], a) for a in value.origin[1] if a is not None)

    def union(self, a: Tree, b: Tree) -> None:
        self.axes.union(a, b)

    def fixed(self, shape: Sequence[int]) -> Value:
        return Value([self.axes.fixed(int(n)) for n in shape])

    def broadcast(self, values: Sequence[Value]) -> list[Tree]:
        """Axes of the broadcast result; axes of size 1 stretch."""
        ndim = max((len(v.dims) for v in values), default=0)
        out: list[Tree] = []
        for i in range(ndim):
            trees = [v.dims[i - ndim] for v in values if len(v.dims) >= ndim - i]
            wide = [t for t in trees if size(t) != 1]
            for t in wide[1:]:
                self.union(wide[0], t)
            out.append(wide[0] if wide else UNIT)
        return out


F = TypeVar("F", bound=Rule)


def rule(*names: str) -> Callable[[F], F]:
    def register(f: F) -> F:
        RULES.update({f"aten.{n}": f for n in names})
        return f

    return register


def at_axis(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim

"""From the axes of a finished trace to a permutation spec: groups are named, layouts written, dependencies made sayable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ._domain import EXPLODE, Axes, Family, Node, Product, Sum, Tree
from ._rule import Value
from .layout import Layout
from .permutation import AxisSpec, Group, PermutationSpec, normalise

if TYPE_CHECKING:
    from .trace import Walk


def build(walk: Walk, known: set[str]) -> tuple[PermutationSpec, dict[int, str]]:
    """The spec of a finished walk, and the group name of each free node (by id)."""
    axes = walk.axes
    values = {n: v for n, v in walk.parameters.items() if n in known}
    for v in values.values():
        axes.keep_parents(v.dims)
    _settle(axes, values)
    names: dict[int, str] = {}
    groups: dict[str, Group] = {}
    tensors: dict[str, tuple[AxisSpec, ...]] = {}

    def name_of(node: Node) -> str:
        return names[id(node)]

    def christen(name: str, axis: int, tree: Tree) -> None:
        """Groups are called after the first place they are found at: tensor/axis, numbered within the axis."""
        new = [n for n in axes.leaves(tree) if not n.fixed and id(n) not in names]
        for k, node in enumerate(dict.fromkeys(new)):
            names[id(node)] = f"{name}/{axis}" + (f".{k}" if k else "")

    for name, value in values.items():
        for axis, tree in enumerate(value.dims):
            christen(name, axis, tree)

    def layout(tree: Tree) -> Layout:
        tree = axes.norm(tree)
        if isinstance(tree, Sum):
            return Layout(tuple(s for t in tree.terms for s in layout(t).segments))
        factors = tree.factors if isinstance(tree, Product) else (tree,)
        segment: list[Any] = []
        for f in factors:
            if isinstance(f, Node):
                segment.append(f.size if f.fixed else name_of(f))
            else:
                segment.append(layout(f))
        return Layout((tuple(segment) or (1,),))

    for name, value in values.items():
        found = []
        for axis, tree in enumerate(value.dims):
            made = normalise(layout(tree))
            if any(True for _ in made.groups()):
                role = "in" if (name, axis) in walk.context.consumed else "out"
                found.append(AxisSpec(axis, made, role))
        if found:
            tensors[name] = tuple(found)
    for value in values.values():
        for tree in value.dims:
            for node in axes.leaves(tree):
                if not node.fixed:
                    parents = tuple(name_of(p) for p in axes.parents(node))
                    groups[name_of(node)] = Group(name_of(node), node.size, parents)
    return PermutationSpec(groups, tensors, "traced", walk.notes), names


def _settle(axes: Axes, values: Mapping[str, Value]) -> None:
    """Shrinks until every dependency can be written down: parents are free groups of the same segment, an enclosing one,
    or lead another axis of the same tensor; no families are left."""
    changed = True
    while changed:
        changed = False
        for v in values.values():
            for tree in v.dims:
                for family in _families(axes, tree):
                    for m in family.members[1:]:
                        axes.union(family.members[0], m)
                    changed = True
        for v in values.values():
            for node in [n for t in v.dims for n in axes.leaves(t)]:
                for p in axes.parents(node):
                    if p.fixed:
                        if p.size <= EXPLODE:
                            axes.explode(p)
                        else:
                            node.parents = [q for q in axes.parents(node) if q is not p]
                        changed = True
        for v in values.values():
            trees = [axes.norm(t) for t in v.dims]
            leads = [_leader(t) for t in trees]
            for i, tree in enumerate(trees):
                for segment, enclosing in _segments(axes, tree, ()):
                    here = {id(n) for n in (*segment, *enclosing)}
                    for node in segment:
                        lost = [
                            p
                            for p in axes.parents(node)
                            if id(p) not in here and not any(lead is p for j, lead in enumerate(leads) if j != i)
                        ]
                        if lost:
                            node.parents = [p for p in axes.parents(node) if p not in lost]
                            changed = True


def _leader(tree: Tree) -> Tree | None:
    return tree.factors[0] if isinstance(tree, Product) and tree.factors else tree if isinstance(tree, Node) else None


def _families(axes: Axes, tree: Tree) -> Iterator[Family]:
    tree = axes.norm(tree)
    if isinstance(tree, Family):
        yield tree
    elif not isinstance(tree, Node):
        for t in tree.factors if isinstance(tree, Product) else tree.terms:
            yield from _families(axes, t)


def _segments(axes: Axes, tree: Tree, enclosing: tuple[Node, ...]) -> Iterator[tuple[list[Node], tuple[Node, ...]]]:
    """(direct leaves, leaves of enclosing segments) of every segment of a tree."""
    tree = axes.norm(tree)
    if isinstance(tree, Node):
        yield [tree], enclosing
    elif isinstance(tree, Sum):
        for t in tree.terms:
            yield from _segments(axes, t, enclosing)
    elif isinstance(tree, Product):
        direct = [f for f in tree.factors if isinstance(f, Node)]
        yield direct, enclosing
        for f in tree.factors:
            if not isinstance(f, Node):
                yield from _segments(axes, f, (*enclosing, *direct))

"""What alignment works on: *views* (where units show up in tensors) and *units* (groups that are solved together)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .layout import Layout, factor_size
from .permutation import AxisSpec, PermutationSpec

Signature = tuple[str, ...]  # the groups that number the rows of a similarity matrix, parents first


@dataclass(frozen=True)
class View:
    """The part of one tensor axis whose positions are the units of one signature (times fixed factors)."""

    tensor: str
    axis: AxisSpec
    signature: Signature
    positions: Tensor | None  # along the axis; None = all, in order
    sizes: tuple[int, ...]  # of the factors as they lie on the axis
    order: tuple[int, ...]  # of the factors: signature first, then fixed ones

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor as a feature matrix [units, everything else]."""
        return self.rows_of_axis(tensor.movedim(self.axis.axis, 0))

    def rows_of_axis(self, x: Tensor) -> Tensor:
        """The same for something whose first axis is laid out like this axis (activations)."""
        if self.positions is not None:
            x = x.index_select(0, self.positions.to(x.device))
        count = len(self.signature)
        if len(self.sizes) > count:  # fixed factors are features
            x = x.reshape(*self.sizes, -1)
            x = x.permute(*self.order, len(self.sizes))
        elif self.order != tuple(range(count)):
            x = x.reshape(*self.sizes, -1).permute(*self.order, count)
        n = 1
        for k in self.order[:count]:
            n *= self.sizes[k]
        return x.reshape(n, -1)


def _paths(layout: Layout, spec: PermutationSpec) -> Iterator[tuple[list[str | int], Tensor]]:
    """Leaf factors of every segment, nested ones spelled out, with the positions they cover (row-major in the factors)."""
    offset = 0
    for segment in layout.segments:
        widths = [factor_size(f, spec.size) for f in segment]
        n = 1
        for w in widths:
            n *= w
        choices: list[tuple[list[str | int], Tensor]] = [([], torch.zeros(1, dtype=torch.int64, device="cpu"))]
        for f, w in zip(segment, widths, strict=True):
            parts = list(_paths(f, spec)) if isinstance(f, Layout) else [([f], torch.arange(w, device="cpu"))]
            choices = [
                ([*names, *more], (at[:, None] * w + p[None, :]).reshape(-1))
                for names, at in choices
                for more, p in parts
            ]
        for names, at in choices:
            yield names, at + offset
        offset += n


def views(spec: PermutationSpec) -> list[View]:
    """Every view of a spec, in the order of its tensors."""
    depth = {g: len(spec._ancestors(g)) for g in spec.groups}
    out = []
    for tensor, axes in spec.tensors.items():
        for a in axes:
            whole = a.layout.size(spec.size)
            for names, positions in _paths(a.layout, spec):
                groups = [f for f in names if isinstance(f, str)]
                if not groups or len(set(groups)) != len(groups):
                    continue
                signature = tuple(sorted(groups, key=lambda g: (depth[g], g)))
                order = [names.index(g) for g in signature]
                order += [k for k in range(len(names)) if k not in order]
                sizes = tuple(factor_size(f, spec.size) for f in names)
                all_in_order = positions.numel() == whole and torch.equal(positions, torch.arange(whole, device="cpu"))
                out.append(View(tensor, a, signature, None if all_in_order else positions, sizes, tuple(order)))
    return out


@dataclass
class Unit:
    """Groups that share segments or depend on each other; aligned in one go."""

    groups: tuple[str, ...]
    views: list[View] = field(default_factory=list)

    @cached_property
    def signatures(self) -> list[Signature]:
        return list(dict.fromkeys(v.signature for v in self.views))

    @cached_property
    def tensors(self) -> set[str]:
        return {v.tensor for v in self.views}

    @property
    def name(self) -> str:
        return self.groups[0]


def units(spec: PermutationSpec) -> list[Unit]:
    """The units of a spec, in the order their tensors appear."""
    home: dict[str, str] = {g: g for g in spec.groups}

    def find(g: str) -> str:
        while home[g] != g:
            g = home[g]
        return g

    def join(groups: Iterable[str]) -> None:
        first, *rest = [find(g) for g in groups]
        for g in rest:
            home[find(g)] = find(first)

    every = views(spec)
    for v in every:
        join(v.signature)
    for g in spec.groups.values():
        join((g.name, *g.parents))
    found: dict[str, Unit] = {}
    for v in every:
        root = find(v.signature[0])
        if root not in found:
            members = [g for g in spec.groups if find(g) == root]
            members.sort(key=lambda g: len(spec._ancestors(g)))
            found[root] = Unit(tuple(members))
        found[root].views.append(v)
    return list(found.values())

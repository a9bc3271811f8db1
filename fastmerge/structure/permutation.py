"""PermutationSpec: the permutation symmetries of a network, as data.

A *group* is a set of axes that must be permuted together (hidden units, a residual stream, attention heads). A group may
have parents: there is then one permutation per position of those (the dims inside each head). The spec says for every
axis of every tensor which groups its indices are made of (see :mod:`.layout`) and whether the axis produces the units
(role "out": rows of a weight, biases, norms) or consumes them (role "in": the input axis of the next weight).

Convention everywhere: ``out[i] = in[perm[i]]``. Permutations of model m live in the frame of the anchor: position i of the
aligned model is position perm[i] of the original one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, did_you_mean
from .layout import Layout, Perms, free_parents, source_index

Permutations = dict[str, Tensor]
_OTHER_SPEC = "give the spec of this model: spec=None recognises it, spec_for(model, example_inputs) derives one"


@dataclass(frozen=True)
class Group:
    """`size` units; one permutation of them for every position of the parents."""

    name: str
    size: int
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class AxisSpec:
    """One axis of a tensor that is made of groups."""

    axis: int
    layout: Layout
    role: str = "out"  # "out" makes the units, "in" consumes them


@dataclass
class PermutationSpec:
    """Groups and, per tensor, the axes made of them. Axes and tensors that are not listed never move."""

    groups: dict[str, Group]
    tensors: dict[str, tuple[AxisSpec, ...]]
    architecture: str = "traced"
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for group in self.groups.values():
            for p in group.parents:
                if p not in self.groups:
                    raise ValueError(
                        f"group {group.name!r}: its parent {p!r} is not a group of the spec; add it to groups"
                    )
        for name, axes in self.tensors.items():
            for a in axes:
                for g in a.layout.groups():
                    if g not in self.groups:
                        raise ValueError(f"{name}, axis {a.axis}: {g!r} is not a group of the spec; add it to groups")

    # ---- looking things up -------------------------------------------------------------------------------------------
    def size(self, group: str) -> int:
        return self.groups[group].size

    def parents(self, group: str) -> tuple[str, ...]:
        return self.groups[group].parents

    def shape(self, group: str) -> tuple[int, ...]:
        """Shape of a group's permutation tensor: the sizes of its parents, then its own."""
        g = self.groups[group]
        return (*(self.size(p) for p in g.parents), g.size)

    def axes_of(self, group: str) -> Iterator[tuple[str, AxisSpec]]:
        for name, axes in self.tensors.items():
            for a in axes:
                if group in a.layout.groups():
                    yield name, a

    def restricted(self, names: Iterable[str]) -> PermutationSpec:
        """The spec of these tensors alone."""
        kept = set(names)
        tensors = {n: axes for n, axes in self.tensors.items() if n in kept}
        used = {g for axes in tensors.values() for a in axes for g in a.layout.groups()}
        used |= {p for g in used for p in self._ancestors(g)}
        return PermutationSpec({n: g for n, g in self.groups.items() if n in used}, tensors, self.architecture)

    def check(self, shapes: Mapping[str, Iterable[int]], what: str = "the model") -> None:
        """Raises BadInput unless every listed tensor is there and has the sizes the spec says."""
        for name, axes in self.tensors.items():
            if name not in shapes:
                raise BadInput(
                    f"{what} has no tensor {name!r}, which the permutation spec ({self.architecture}) lists",
                    remedy=_OTHER_SPEC,
                )
            shape = tuple(shapes[name])
            for a in axes:
                want = a.layout.size(self.size)
                if a.axis >= len(shape) or shape[a.axis] != want:
                    raise BadInput(
                        f"{what}: {name} has shape {shape}, but axis {a.axis} is '{a.layout}' = {want} in the permutation "
                        f"spec ({self.architecture})",
                        remedy=_OTHER_SPEC,
                    )

    # ---- permutations ------------------------------------------------------------------------------------------------
    def identity(self) -> Permutations:
        return {g: torch.arange(self.size(g), device="cpu").expand(self.shape(g)).contiguous() for g in self.groups}

    def random(self, generator: torch.Generator) -> Permutations:
        """A uniformly random permutation of every group."""
        return {g: torch.rand(self.shape(g), generator=generator, device="cpu").argsort(-1) for g in self.groups}

    def validate(self, perms: Perms) -> None:
        """Raises BadInput unless each entry is a permutation of one of the spec's groups."""
        for name, p in perms.items():
            if name not in self.groups:
                raise BadInput(
                    f"permutation {name!r} is not a group of the spec ({self.architecture})"
                    + did_you_mean(name, self.groups),
                    remedy="give permutations that were made with this spec",
                )
            if tuple(p.shape) != self.shape(name):
                raise BadInput(
                    f"permutation {name!r} has shape {tuple(p.shape)}, expected {self.shape(name)}",
                    remedy="give permutations of a model of this size",
                )
            if not torch.equal(p.sort(-1).values, torch.arange(self.size(name), device="cpu").expand(self.shape(name))):
                raise BadInput(
                    f"permutation {name!r} is not a permutation of 0..{self.size(name) - 1}",
                    remedy="every index must occur once (a .npz file that was edited? align again)",
                )

    def _children_first(self) -> list[str]:
        return sorted(self.groups, key=lambda g: len(self._ancestors(g)))

    def _ancestors(self, group: str) -> set[str]:
        out: set[str] = set()
        for p in self.groups[group].parents:
            out |= {p} | self._ancestors(p)
        return out

    def _parent_source(self, group: str, perms: Perms) -> tuple[Tensor, ...]:
        """For each position of the parents (anchor frame), their source positions: index arrays over the parents' grid."""
        names = self.groups[group].parents
        grids = (
            torch.meshgrid(*(torch.arange(self.size(p), device="cpu") for p in names), indexing="ij") if names else ()
        )
        at = dict(zip(names, grids, strict=True))
        out = []
        for p in names:
            where = tuple(at[q] for q in self.groups[p].parents)
            out.append(perms[p][tuple([*where, at[p]])] if p in perms else at[p])
        return tuple(out)

    def compose(self, first: Perms, second: Perms) -> Permutations:
        """The permutations that do `first`, then `second`."""
        out: Permutations = {}
        for g in self.groups:
            a, b = first.get(g), second.get(g)
            if a is None and b is None:
                continue
            eye = torch.arange(self.size(g), device="cpu").expand(self.shape(g))
            a, b = (eye if a is None else a), (eye if b is None else b)
            # position i of the result is position b[i] of the middle one, whose parents sit at their own source
            moved = a[self._parent_source(g, second)] if self.groups[g].parents else a
            out[g] = moved.gather(-1, b)
        return out

    def inverse(self, perms: Perms) -> Permutations:
        """The permutations that undo `perms`."""
        out: Permutations = {}
        for g in self._children_first():
            if g not in perms and not any(p in perms for p in self.groups[g].parents):
                continue
            p = perms.get(g)
            p = torch.arange(self.size(g), device="cpu").expand(self.shape(g)) if p is None else p
            back = p.argsort(-1)
            out[g] = back[self._parent_source(g, out)] if self.groups[g].parents else back
        return out

    # ---- applying ----------------------------------------------------------------------------------------------------
    def index(self, axis: AxisSpec, perms: Perms, env: Mapping[str, int] | None = None) -> Tensor | None:
        """The gather index of an axis, or None when nothing on it moves. `env` fixes parents that sit on another axis."""
        moving = [g for g in axis.layout.groups() if g in perms]
        if not moving:
            return None
        at = {k: torch.tensor([v], device="cpu") for k, v in (env or {}).items()}
        return source_index(axis.layout, perms, self.size, self.parents, at)[0]

    def crossing(self, name: str) -> dict[int, str]:
        """Axes of a tensor whose permutation depends on a group that leads another of its axes: {axis: group}.

        Grouped convolutions are the case: which inputs a filter sees depends on the group of the filter.
        """
        out = {}
        for a in self.tensors.get(name, ()):
            missing = free_parents(a.layout, self.parents)
            if not missing:
                continue
            leaders = {b.layout.segments[0][0] for b in self.tensors[name] if b.axis != a.axis}
            if len(missing) != 1 or not missing <= leaders:
                raise ValueError(
                    f"{name}, axis {a.axis}: '{a.layout}' needs {sorted(missing)} to lead another axis; begin the layout "
                    "of another axis of this tensor with it"
                )
            out[a.axis] = missing.pop()
        return out

    def permute(
        self,
        name: str,
        tensor: Tensor,
        perms: Perms,
        skip: int | None = None,
        gather: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The tensor with every axis (but `skip`) permuted; the tensor itself when nothing moves.

        `gather(tensor, {axis: index})` does the moving; default: the `permute` operator.
        """
        axes = [a for a in self.tensors.get(name, ()) if a.axis != skip]
        crossing = self.crossing(name)
        indices: dict[int, Tensor] = {}
        for a in axes:
            if a.axis not in crossing:
                index = self.index(a, perms)
                if index is not None:
                    indices[a.axis] = index
        gather = gather or gather_axes
        out = gather(tensor, indices) if indices else tensor
        for a in axes:
            if a.axis in crossing and any(g in perms for g in a.layout.groups()):
                out = self._permute_crossing(name, out, a, crossing[a.axis], perms, gather)
        return out

    def _permute_crossing(
        self, name: str, tensor: Tensor, a: AxisSpec, leader: str, perms: Perms, gather: Callable[..., Tensor]
    ) -> Tensor:
        axis = next(b.axis for b in self.tensors[name] if b.axis != a.axis and b.layout.segments[0][0] == leader)
        count = self.size(leader)
        blocks = []
        for i, block in enumerate(tensor.chunk(count, axis)):
            index = self.index(a, perms, {leader: i})
            blocks.append(block if index is None else gather(block, {a.axis: index}))
        return torch.cat(blocks, axis)

    def permute_state(self, state: Mapping[str, Tensor], perms: Perms) -> dict[str, Tensor]:
        """A state dict with the permutations applied; tensors that do not move are shared with the input."""
        self.check({k: v.shape for k, v in state.items()})
        self.validate(perms)
        return {name: self.permute(name, t, perms) for name, t in state.items()}

    # ---- comparing, storing ------------------------------------------------------------------------------------------
    def signature(self) -> tuple[Any, ...]:
        """Equal for two specs that say the same with other group names: groups are numbered by first appearance."""
        number: dict[str, int] = {}
        rows = []
        for name in sorted(self.tensors):
            for a in sorted(self.tensors[name], key=lambda a: a.axis):
                layout = normalise(a.layout)
                for g in layout.groups():
                    number.setdefault(g, len(number))
                if any(True for _ in layout.groups()):
                    rows.append((name, a.axis, a.role, str(layout.rename(lambda g: f"g{number[g]}"))))
        sizes = [
            (n, self.size(g), tuple(sorted(number[p] for p in self.parents(g) if p in number)))
            for g, n in sorted(number.items(), key=lambda kv: kv[1])
        ]
        return tuple(rows), tuple(sizes)

    def to_json(self) -> str:
        return json.dumps(
            {
                "architecture": self.architecture,
                "groups": {g.name: [g.size, list(g.parents)] for g in self.groups.values()},
                "tensors": {n: [[a.axis, str(a.layout), a.role] for a in axes] for n, axes in self.tensors.items()},
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        try:
            data = json.loads(text)
            groups = {n: Group(n, int(size), tuple(parents)) for n, (size, parents) in data["groups"].items()}
            tensors = {
                n: tuple(AxisSpec(int(axis), Layout.parse(layout), role) for axis, layout, role in axes)
                for n, axes in data["tensors"].items()
            }
            return cls(groups, tensors, data.get("architecture", "file"))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(
                f"not a permutation spec: {type(error).__name__}: {error}",
                remedy="give the text of PermutationSpec.to_json: architecture, groups and tensors",
            ) from error


def normalise(layout: Layout) -> Layout:
    """One way to write each layout: no 1s, neighbouring numbers multiplied, small leading numbers written as sums."""
    segments: list[tuple[Any, ...]] = []
    for segment in layout.segments:
        factors: list[Any] = []
        for f in segment:
            if isinstance(f, Layout):
                f = normalise(f)
                if len(f.segments) == 1:
                    factors.extend(f.segments[0])
                    continue
            if f == 1:
                continue
            if isinstance(f, int) and factors and isinstance(factors[-1], int):
                factors[-1] *= f
            else:
                factors.append(f)
        if len(factors) == 1 and isinstance(factors[0], Layout):
            segments.extend(factors[0].segments)
        elif len(factors) > 1 and isinstance(factors[0], int) and factors[0] <= 64:
            segments.extend([tuple(factors[1:])] * factors[0])
        else:
            segments.append(tuple(factors) or (1,))
    merged: list[tuple[Any, ...]] = []
    for s in segments:
        if merged and len(s) == 1 == len(merged[-1]) and isinstance(s[0], int) and isinstance(merged[-1][0], int):
            merged[-1] = (merged[-1][0] + s[0],)
        else:
            merged.append(s)
    return Layout(tuple(merged))


def gather_axes(tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """The tensor gathered along each axis: out[..., i, ...] = tensor[..., index[i], ...]."""
    for axis, index in indices.items():
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def all_positions(spec: PermutationSpec, groups: Iterable[str]) -> Iterator[tuple[int, ...]]:
    """Every combination of positions of some groups, in row-major order."""
    return product(*(range(spec.size(g)) for g in groups))

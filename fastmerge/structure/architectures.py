"""Permutation specs of known architectures, from specs/*.toml: patterns over tensor names, sizes from the shapes.

A pattern is a tensor name with ``{i}`` for a number and ``{weight|bias}`` for alternatives; the first pattern that fits
a tensor gives its axes. Layouts name groups with the same numbers (``{s-1}`` is the one before); ``<`` marks an axis that
consumes its units. Sizes of groups follow from the shapes, given the numbers of heads.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from ..errors import BadInput, did_you_mean
from .layout import Layout
from .permutation import AxisSpec, Group, PermutationSpec, normalise

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Shapes = Mapping[str, tuple[int, ...]]
_HOLE = re.compile(r"\{([^{}]*)\}")
_STEP = re.compile(r"(\w+)([+-]\d+)?\Z")
_OTHER = "leave the architecture out to recognise it, or derive a spec: spec_for(model, example_inputs)"
_HEADS = "check the numbers of heads (heads=, kv_heads=), or derive a spec: spec_for(model, example_inputs)"


def _needs(template: str) -> set[str]:
    """The numbers a template asks for."""
    return {re.split("[+-]", m[1])[0] for m in _HOLE.finditer(template)}


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Every shipped architecture by name, in order of recognition."""
    folder = resources.files("fastmerge.structure") / "specs"
    found = {p.name[:-5]: tomllib.loads(p.read_text()) for p in folder.iterdir() if p.name.endswith(".toml")}
    return dict(sorted(found.items(), key=lambda kv: (kv[1].get("kind") == "chain", kv[0])))


def _regex(pattern: str, prefix: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def hole(m: re.Match[str]) -> str:
        text = m[1]
        if "|" in text:
            return f"(?:{'|'.join(re.escape(t) for t in text.split('|'))})"
        if text in seen:
            return f"(?P={text})"
        seen.add(text)
        return rf"(?P<{text}>\d+)"

    parts, at = [], 0
    for m in _HOLE.finditer(pattern):
        parts += [re.escape(pattern[at : m.start()]), hole(m)]
        at = m.end()
    return re.compile(prefix + "".join(parts) + re.escape(pattern[at:]) + r"\Z")


def _fill(text: str, numbers: Mapping[str, int]) -> str:
    def hole(m: re.Match[str]) -> str:
        step = _STEP.match(m[1])
        assert step is not None, m[1]
        return str(numbers[step[1]] + int(step[2] or 0))

    return _HOLE.sub(hole, text)


def _prefix(data: Mapping[str, Any], shapes: Shapes) -> str | None:
    """What comes before the architecture's own names in this checkpoint ("model.", ""), or None if it is another one."""
    patterns = [_regex(p, r"(?P<prefix_>(?:[\w]+\.)*?)") for p in data["recognise"]]
    found: list[set[str]] = []
    for p in patterns:
        found.append({m["prefix_"] for n in shapes if (m := p.match(n))})
    common = set.intersection(*found) if found else set()
    for prefix in sorted(common, key=len):
        if not any(_regex(a, re.escape(prefix)).match(n) for a in data.get("absent", ()) for n in shapes):
            return prefix
    return None


def names() -> list[str]:
    """Names of the shipped architectures."""
    return sorted(catalogue())


def detect(shapes: Shapes, **options: Any) -> PermutationSpec:
    """The spec of the shipped architecture whose tensor names fit; raises BadInput when none does."""
    for name, data in catalogue().items():
        if data.get("kind") == "chain":
            if (spec := _chain(name, shapes)) is not None:
                return spec
        elif _prefix(data, shapes) is not None:
            return load(name, shapes, **options)
    raise BadInput(
        "no shipped architecture has tensors of these names",
        remedy="derive the spec with fastmerge.structure.spec_for(model, example_inputs) and pass it as spec=; "
        f"shipped: {', '.join(names())}",
    )


def load(architecture: str, shapes: Shapes, **options: Any) -> PermutationSpec:
    """The spec of a shipped architecture for tensors of these shapes.

    Args:
        options: what shapes do not tell: ``heads``, ``kv_heads`` (default: heads), ``norm_groups`` (default 32).

    Raises: BadInput for an unknown name, tensors that are not of the architecture, or a missing option.
    """
    if architecture not in catalogue():
        raise BadInput(
            f"unknown architecture {architecture!r}{did_you_mean(architecture, catalogue())}",
            remedy=f"the shipped ones are {', '.join(names())}; spec_for(model, example_inputs) handles any other",
        )
    data = catalogue()[architecture]
    if data.get("kind") == "chain":
        spec = _chain(architecture, shapes)
        if spec is None:
            raise BadInput(
                f"the tensors are not a chain of linear or convolution layers, as {architecture!r} expects",
                remedy=_OTHER,
            )
        return spec
    prefix = _prefix(data, shapes)
    if prefix is None:
        raise BadInput(
            f"the tensors are not of architecture {architecture!r} (it has {', '.join(data['recognise'])})",
            remedy=_OTHER,
        )
    tensors, instances = _axes(data, prefix, shapes)
    alias = _aliases(data, prefix, shapes, instances)

    def final(group: str) -> str:
        while group in alias:
            group = alias[group]
        return group

    tensors = {n: [(a, layout.rename(final), role) for a, layout, role in axes] for n, axes in tensors.items()}
    sizes = _sizes(architecture, data, tensors, shapes, instances, options)
    fixed = {g for t in data.get("fixed", ()) for g in _instances(t, instances)}

    def settle(layout: Layout) -> Layout:
        def factor(f: Any) -> Any:
            if isinstance(f, Layout):
                return settle(f)
            return sizes[f] if isinstance(f, str) and (f in fixed or sizes[f] == 1) else f

        return normalise(Layout(tuple(tuple(factor(f) for f in s) for s in layout.segments)))

    parents = {
        g: [final(_fill(p, numbers)) for p in ps]
        for t, ps in data.get("parents", {}).items()
        for g, numbers in _instances(t, instances).items()
    }
    made: dict[str, tuple[AxisSpec, ...]] = {}
    for n, axes in tensors.items():
        found = [AxisSpec(a, settle(layout), role) for a, layout, role in axes]
        if any(True for a in found for _ in a.layout.groups()):
            made[n] = tuple(a for a in found if any(True for _ in a.layout.groups()))
    used = list(dict.fromkeys(g for axes in made.values() for a in axes for g in a.layout.groups()))
    groups = {g: Group(g, sizes[g], tuple(p for p in parents.get(g, ()) if p in used)) for g in used}
    return PermutationSpec(groups, made, architecture)


Axes = dict[str, list[tuple[int, Layout, str]]]


def _axes(data: Mapping[str, Any], prefix: str, shapes: Shapes) -> tuple[Axes, list[dict[str, int]]]:
    """Per tensor, its (axis, layout, role), and every set of numbers that occurred."""
    rules = [
        (_regex(p, q), axes) for p, axes in data["tensors"].items() for q in dict.fromkeys((re.escape(prefix), ""))
    ]
    out: Axes = {}
    instances: list[dict[str, int]] = []
    for name in shapes:
        for pattern, axes in rules:
            m = pattern.match(name)
            if m is not None:
                numbers = {k: int(v) for k, v in m.groupdict().items()}
                if numbers not in instances:
                    instances.append(numbers)
                out[name] = [
                    (int(a), Layout.parse(_fill(t.lstrip("<"), numbers)), "in" if t.startswith("<") else "out")
                    for a, t in axes.items()
                ]
                break
    return out, instances


def _instances(template: str, instances: list[dict[str, int]]) -> dict[str, dict[str, int]]:
    """A template filled with every set of numbers that has all it asks for: {text: numbers}."""
    return {_fill(template, n): n for n in instances if _needs(template) <= set(n)}


def _aliases(data: Mapping[str, Any], prefix: str, shapes: Shapes, instances: list[dict[str, int]]) -> dict[str, str]:
    out: dict[str, str] = {}
    for rule in data.get("same", ()):
        for numbers in instances:
            if _needs(rule["unless"]) <= set(numbers) and prefix + _fill(rule["unless"], numbers) not in shapes:
                kept, other = (_fill(g, numbers) for g in rule["groups"])
                if kept != other:
                    out[other] = kept
    return out


def _sizes(
    architecture: str, data: Mapping[str, Any], tensors: Axes, shapes: Shapes, instances: list[dict[str, int]],
    options: Mapping[str, Any],
) -> dict[str, int]:  # fmt: skip
    known: dict[str, int] = {}
    given = {"norm_groups": 32, **options}
    if "kv_heads" not in given and "heads" in given:
        given["kv_heads"] = given["heads"]
    if isinstance(given.get("heads"), int) and isinstance(given.get("kv_heads"), int):
        given["heads_per_kv"] = given["heads"] // given["kv_heads"]
    for template, option in data.get("sizes", {}).items():
        for g in _instances(template, instances):
            if option not in given:
                raise BadInput(
                    f"architecture {architecture!r} needs {option}, which the shapes do not tell",
                    remedy="pass nn.Modules, or spec=fastmerge.structure.named_spec(name, state, heads=12)",
                )
            known[g] = int(given[option])
    pending = [(n, a, layout, shapes[n]) for n, axes in tensors.items() for a, layout, _ in axes]
    while pending:
        left = []
        for n, a, layout, shape in pending:
            if a >= len(shape):
                raise BadInput(
                    f"{n} has shape {shape}, but architecture {architecture!r} expects an axis {a}", remedy=_OTHER
                )
            solved = _solve_size(f"{n}: axis {a}", architecture, layout, shape[a], known)
            if solved is None:
                left.append((n, a, layout, shape))
            elif solved:
                known.update(solved)
            elif layout.size(known.__getitem__) != shape[a]:
                raise BadInput(
                    f"{n}: axis {a} of shape {shape} should be '{layout}' = {layout.size(known.__getitem__)} "
                    f"(architecture {architecture!r})",
                    remedy=_HEADS,
                )
        if len(left) == len(pending):
            n, a, layout, shape = left[0]
            raise BadInput(
                f"{n}: the sizes in '{layout}' can not be told from axis {a} of shape {shape}", remedy=_OTHER
            )
        pending = left
    return known


def _solve_size(
    where: str, architecture: str, layout: Layout, total: int, known: Mapping[str, int]
) -> dict[str, int] | None:
    """{} when all sizes are known, {group: size} when one follows, None when more than one is missing."""
    unknown = {g for g in layout.groups() if g not in known}
    if not unknown:
        return {}
    if len(unknown) > 1:
        return None
    g = unknown.pop()

    def size_with(value: int) -> int:
        return layout.size(lambda n: value if n == g else known[n])

    zero, one, two = (size_with(v) for v in (0, 1, 2))
    slope = one - zero
    if two - one != slope or slope <= 0 or (total - zero) % slope:
        raise BadInput(
            f"{where} of size {total} does not fit '{layout}' (architecture {architecture!r})", remedy=_HEADS
        )
    return {g: (total - zero) // slope}


def _layer_orders(shapes: Shapes) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in the order of their layers. Modules list them so; files sort names, where layers.10 precedes layers.2
    and a bias its weight. Runs of layers that differ by a number only are put in the order of that number."""
    owners = list(dict.fromkeys(n.rpartition(".")[0] for n in shapes))
    runs = [list(run) for _, run in itertools.groupby(owners, lambda o: re.sub(r"\d+", "#", o))]
    for run in runs:
        run.sort(key=lambda o: [int(d) for d in re.findall(r"\d+", o)])

    def ordered(runs: list[list[str]]) -> dict[str, tuple[int, ...]]:
        of = {o: [n for n in shapes if n.rpartition(".")[0] == o] for run in runs for o in run}
        return {n: tuple(shapes[n]) for o in of for n in sorted(of[o], key=lambda n: -len(shapes[n]))}

    def rank(run: list[str]) -> int:
        return max(len(s) for n, s in shapes.items() if n.rpartition(".")[0] in run)

    yield ordered(runs)
    if all(rank(run) > 1 for run in runs):  # convolutions come before what their features are classified by
        yield ordered(sorted(runs, key=rank, reverse=True))


def _chain(architecture: str, shapes: Shapes) -> PermutationSpec | None:
    """Layers one after the other, each with optional bias and norm: the hidden units between two weights are a group."""
    found = (_chain_in_order(architecture, s) for s in _layer_orders(shapes))
    return next((spec for spec in found if spec is not None), None)


def _chain_in_order(architecture: str, shapes: Shapes) -> PermutationSpec | None:
    weights = [n for n, s in shapes.items() if len(s) >= 2 and n.endswith("weight")]
    convolutions = sum(len(shapes[n]) > 2 for n in weights)
    if len(weights) < 2 or (convolutions > 0) != (architecture == "vgg"):
        return None
    groups: dict[str, Group] = {}
    tensors: dict[str, tuple[AxisSpec, ...]] = {}
    before: str | None = None
    for name, shape in shapes.items():
        owner = name.rpartition(".")[0]
        if name in weights:
            axes = []
            if before is not None:
                size = groups[before].size
                if shape[1] % size or (len(shape) > 2 and shape[1] != size):
                    return None
                spread: tuple[Any, ...] = (before,) if shape[1] == size else (before, shape[1] // size)
                axes.append(AxisSpec(1, Layout((spread,)), "in"))
            before = owner or name
            groups[before] = Group(before, shape[0])
            tensors[name] = (AxisSpec(0, Layout(((before,),))), *axes)
        elif before is not None and len(shape) == 1:
            if shape[0] != groups[before].size:
                return None
            tensors[name] = (AxisSpec(0, Layout(((before,),))),)
        elif shape:
            return None
    assert before is not None
    del groups[before]  # the outputs stay where they are
    kept = {n: tuple(a for a in axes if before not in a.layout.groups()) for n, axes in tensors.items()}
    return PermutationSpec(groups, {n: axes for n, axes in kept.items() if axes}, architecture)

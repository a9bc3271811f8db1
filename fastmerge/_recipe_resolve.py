"""From a checked recipe and tensor names to one plan per output tensor. No architecture tables: names alone decide.

Two rules are mergekit's, observed on its 0.1.5 (tests/integrations/make_mergekit_golden.py). Depth t of a tensor, for
gradients: layer i of n has i / (n - 1), or 1 when n = 1, counted within its slice; a tensor outside the layers has 0,
the final norm and the head too. Filters of a per-model parameter see the name of that model's own tensor, those of
other parameters the name in the output; the two differ only in slices.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._recipe_settings import MISSING, Setting
from .errors import BadInput

if TYPE_CHECKING:
    from ._recipe_check import Compiled, Piece, Source
    from .methods import Method, Parameter
    from .recipe import ModelRef

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|resblocks)\.(\d+)\.")
# Tensors outside the layers that come before them; all others come after. Only slices care.
_BEFORE = re.compile(
    r"(?<!un)embed(?!_out)|wte|wpe|(^|\.)emb(?!ed)|position|patch|cls_token|class_token|token_type|stem|"
    r"(^|\.)conv1|conv_in|ln_pre|pre_?layr?norm|(^|\.)tok_"
)


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made."""

    name: str  # in the output
    base_source: str | None  # the tensor of the base it starts from; None when the method takes no base
    sources: tuple[str, ...]  # the tensor of each model taking part
    models: tuple[int, ...]  # which models those are: positions in Recipe.inputs
    parameters: dict[str, Any]  # recipe spelling -> value; per-model parameters are lists aligned with sources


@dataclass(frozen=True)
class Layout:
    """The tensor names of a model, by layer."""

    stacks: dict[str, int]  # text before the layer number -> number of layers
    layers: dict[str, tuple[str, int, str]]  # name -> (stack, layer, rest)

    @classmethod
    def of(cls, names: Sequence[str]) -> Layout:
        stacks: dict[str, int] = {}
        layers: dict[str, tuple[str, int, str]] = {}
        for name in names:
            found = _LAYER.search(name)
            if found:
                stack, layer, rest = name[: found.start(1)], int(found[1]), name[found.end(1) :]
                stacks[stack] = max(stacks.get(stack, 0), layer + 1)
                layers[name] = (stack, layer, rest)
        return cls(stacks, layers)


def describe_parameters(method: Method, plans: Sequence[TensorPlan], models: int) -> dict[str, Any]:
    """Each parameter over all tensors: its value where it is the same everywhere, else ``least … most``.

    Per-model parameters are lists with an entry per model.
    """
    out: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        if parameter.per_model:
            columns: list[list[Any]] = [[] for _ in range(models)]
            for plan in plans:
                for model, value in zip(plan.models, plan.parameters[name], strict=True):
                    columns[model].append(value)
            out[name] = [_summary(values) for values in columns]
        else:
            out[name] = _summary([plan.parameters[name] for plan in plans])
    return out


def _summary(values: list[Any]) -> Any:
    if not values or all(v == values[0] for v in values):
        return values[0] if values else None
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return f"{min(values):g} … {max(values):g}"
    return "varies"


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers feeds them (embeddings) rather than follows them (final norm, head)."""
    return _BEFORE.search(name.lower()) is not None


OUTSIDE = 0.0  # depth of a tensor that is in no layer


def _depth(layer: int, layers: int) -> float:
    return layer / (layers - 1) if layers > 1 else 1.0


def resolve(
    compiled: Compiled, template: ModelRef, names: Sequence[str], others: Mapping[ModelRef, Sequence[str]]
) -> list[TensorPlan]:
    """See :meth:`fastmerge.recipe.Recipe.resolve`."""
    layout = Layout.of(names)
    if compiled.sliced:
        return _resolve_slices(compiled, template, names, layout, others)
    piece, plans = compiled.pieces[0], []
    for name in names:
        stack, layer, _ = layout.layers.get(name, ("", 0, ""))
        t = _depth(layer, layout.stacks[stack]) if stack in layout.stacks else OUTSIDE
        plans.append(_plan(compiled, piece, name, name, [name] * len(piece.sources), t))
    return plans


def _resolve_slices(
    compiled: Compiled,
    template: ModelRef,
    names: Sequence[str],
    layout: Layout,
    others: Mapping[ModelRef, Sequence[str]],
) -> list[TensorPlan]:
    if len(layout.stacks) != 1:
        found = ", ".join(sorted(layout.stacks)) or "none"
        raise BadInput(
            f"slices need a model with one stack of layers; {template} has {len(layout.stacks)} ({found})",
            where=compiled.marks.where(("slices",)),
            remedy="list the models under models: instead",
        )
    (stack,) = layout.stacks
    layouts = {ref: Layout.of(of) for ref, of in others.items()} | {template: layout}
    outside = [name for name in names if name not in layout.layers]
    first, last = compiled.pieces[0], compiled.pieces[-1]
    plans = [_plan(compiled, first, n, n, [n] * len(first.sources), OUTSIDE) for n in outside if is_before_layers(n)]
    at = 0
    for piece in compiled.pieces:
        members = [*piece.sources, *([piece.base] if piece.base else [])]
        for source in members:
            known = layouts.get(source.ref)
            assert source.layers is not None
            if known is not None and source.layers[1] > known.stacks.get(stack, 0):
                raise BadInput(
                    f"layer_range {list(source.layers)} leaves model {source.ref}, which has {known.stacks.get(stack, 0)} layers",
                    where=compiled.marks.where((*source.path, "layer_range")),
                    remedy=f"end the range at {known.stacks.get(stack, 0)} or before (it is [first, end), counted from 0)",
                )
        lead = piece.base or piece.sources[0]
        by_layer = _rests(layouts.get(lead.ref, layout), stack)
        assert lead.layers is not None
        for i in range(piece.layers):
            t = _depth(i, piece.layers)
            for rest in by_layer[min(lead.layers[0] + i, max(by_layer))]:
                sources = [f"{stack}{s.layers[0] + i}{rest}" for s in piece.sources if s.layers]
                base = f"{stack}{lead.layers[0] + i}{rest}"
                plans.append(_plan(compiled, piece, f"{stack}{at + i}{rest}", base, sources, t))
        at += piece.layers
    plans += [_plan(compiled, last, n, n, [n] * len(last.sources), OUTSIDE) for n in outside if not is_before_layers(n)]
    return plans


def _rests(layout: Layout, stack: str) -> dict[int, list[str]]:
    out: dict[int, list[str]] = {}
    for of, layer, rest in layout.layers.values():
        if of == stack:
            out.setdefault(layer, []).append(rest)
    return out


def _plan(compiled: Compiled, piece: Piece, name: str, base: str, sources: list[str], t: float) -> TensorPlan:
    parameters: dict[str, Any] = {}
    for parameter in compiled.method.parameters.values():
        above = [level[parameter.name] for level in (piece.settings, *compiled.levels) if parameter.name in level]
        if parameter.per_model:
            own = [s.settings.get(parameter.name) for s in piece.sources]
            parameters[parameter.name] = [
                _evaluate(compiled, parameter, [*([o] if o else []), *above], of, t, s)
                for o, s, of in zip(own, piece.sources, sources, strict=True)
            ]
        else:
            parameters[parameter.name] = _evaluate(compiled, parameter, above, name, t, None)
    takes_base = compiled.method.base != "ignored" and piece.base is not None
    return TensorPlan(
        name, base if takes_base else None, tuple(sources), tuple(s.model for s in piece.sources), parameters
    )


def _evaluate(
    compiled: Compiled, parameter: Parameter, settings: list[Setting], name: str, t: float, source: Source | None
) -> Any:
    from .methods import REQUIRED

    for setting in settings:  # the innermost level that has a value for this tensor wins
        value = setting.at(name, t)
        if value is not MISSING:
            return value
    if parameter.default is not REQUIRED:
        return parameter.default
    of = f" of model {source.ref}" if source else ""
    raise BadInput(
        f"{parameter.name}{of} has no value for tensor {name}: none of its filters match",
        where=compiled.marks.where(settings[0].path) if settings else None,
        remedy="end the list with an entry that has a value: and no filter:",
    )

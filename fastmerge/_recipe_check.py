"""Checks of a recipe that need no checkpoint; all problems are reported together, each with its line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._recipe_settings import Setting, parse
from ._recipe_yaml import Marks, Path
from .errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from .methods import Method, Parameter
    from .recipe import ModelRef, Recipe

_NO_EFFECT = {"int8_mask": "int8_mask has no effect here: masks are never stored"}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class Source:
    """One model of a piece, with the layers it gives (None = all)."""

    ref: ModelRef
    layers: tuple[int, int] | None
    path: Path
    settings: dict[str, Setting] = field(default_factory=dict)
    model: int = -1  # position in inputs


@dataclass
class Piece:
    """Consecutive output layers made from the same sources: one slice, or the whole model."""

    path: Path
    base: Source | None
    sources: list[Source]
    settings: dict[str, Setting]

    @property
    def layers(self) -> int:
        first = (self.base or self.sources[0]).layers
        assert first is not None
        return first[1] - first[0]


@dataclass
class Compiled:
    """A recipe after all checks that need no checkpoint."""

    method: Method
    marks: Marks
    pieces: list[Piece]
    levels: list[dict[str, Setting]]  # module, then global
    base: ModelRef | None
    inputs: tuple[ModelRef, ...]
    sliced: bool
    notes: list[str]

    def layer_sources(self, template: ModelRef) -> list[tuple[ModelRef, int]] | None:
        if not self.sliced:
            return None
        out: list[tuple[ModelRef, int]] = []
        for piece in self.pieces:
            first = piece.base or piece.sources[0]
            assert first.layers is not None
            out += [(first.ref, i) for i in range(*first.layers)]
        return out


class _Compiler:
    def __init__(self, recipe: Recipe, method: Method, marks: Marks) -> None:
        self.recipe, self.method, self.marks = recipe, method, marks
        self.problems: list[BadInput] = []
        self.notes: list[str] = []
        self.inputs: list[ModelRef] = []
        self.base = recipe.base_model or _base_of_slices(recipe)

    def report(self, message: str, path: Path, remedy: str | None = None) -> None:
        self.problems.append(BadInput(message, where=self.marks.where(path), remedy=remedy))

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def settings(self, raw: Mapping[str, Any], path: Path, *, of_model: bool, used: bool = True) -> dict[str, Setting]:
        out: dict[str, Setting] = {}
        for key, value in raw.items():
            at = (*path, key)
            name = key[:-1] if key.endswith("_") else key
            name = self.method.aliases.get(name, name)
            parameter = self.method.parameters.get(name)
            if parameter is None and key in _NO_EFFECT:
                self.note(_NO_EFFECT[key])
            elif parameter is None:
                known = list(self.method.parameters)
                listed = f"its parameters are {', '.join(known)}" if known else "it has no parameters"
                self.report(f"{self.method.name} has no parameter {key!r}{did_you_mean(key, known)}", at, listed)
            elif of_model and not parameter.per_model:
                self.report(
                    f"{name} applies to the whole merge, not to one model", at, "move it to the top-level parameters:"
                )
            elif used:
                # a bad value is reported, and must not be reported again as a missing one
                out[name] = parse(parameter, value, at, self.report) or Setting((), at)
        return out

    def check_ref(self, ref: ModelRef, path: Path) -> None:
        if ref.lora:
            self.report(
                f"{ref}: LoRA adapters can not be merged on the fly",
                path,
                "fold the adapter into its model first (peft: merge_and_unload, save_pretrained) and name that folder",
            )

    def sources(self, entries: Sequence[Any], path: Path, base: ModelRef | None) -> tuple[Source | None, list[Source]]:
        base_source, sources = None, []
        base_is_input = self.method.base == "ignored"
        for i, entry in enumerate(entries):
            at = (*path, i)
            self.check_ref(entry.model, (*at, "model"))
            layers = getattr(entry, "layer_range", None)
            if layers is not None and not 0 <= layers[0] < layers[1]:
                self.report(
                    f"layer_range {list(layers)} is empty or negative", (*at, "layer_range"), "it is [first, end)"
                )
            is_base = not base_is_input and entry.model == base
            source = Source(
                entry.model, layers, at,
                self.settings(entry.parameters, (*at, "parameters"), of_model=True, used=not is_base),
            )  # fmt: skip
            if not is_base:
                sources.append(source)
            elif base_source is not None:
                self.report(f"the base model {base} is listed twice", at, "remove one of them")
            else:
                base_source = source
                if entry.parameters:
                    self.note(f"parameters of the base model {base} have no effect")
        return base_source, sources

    def piece(self, entries: Sequence[Any], path: Path, key: str, base: ModelRef | None, settings: Any) -> Piece:
        base_source, sources = self.sources(entries, (*path, key), base)
        low, high = self.method.models
        if not low <= len(sources) <= (high or len(sources)):
            wanted = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            beside = "" if self.method.base == "ignored" else " besides the base"
            counted = f"{wanted} model{'' if wanted.endswith(' 1') else 's'}{beside}"
            few = len(sources) < low
            self.report(
                f"{self.method.name} takes {counted}, not {len(sources)}",
                (*path, key),
                f"{'add models under' if few else 'take models out of'} {key}:, or use another method "
                "(`fastmerge methods` lists how many each takes)",
            )
        if base is not None and base_source is None and self.method.base != "ignored":
            spans = {s.layers for s in sources}
            base_source = Source(base, next(iter(spans)) if len(spans) == 1 else None, (*path, key))
            if len(spans) > 1:
                self.report(
                    f"this slice does not say which layers of the base model {base} it starts from",
                    (*path, key),
                    f"add a source with model: {base} and its layer_range:",
                )
        ranges = {s.layers[1] - s.layers[0] for s in [*sources, *([base_source] if base_source else [])] if s.layers}
        if len(ranges) > 1:
            self.report(
                f"the sources of a slice give different numbers of layers: {sorted(ranges)}",
                (*path, key),
                "give every source of the slice a layer_range: of the same length",
            )
        return Piece(path, base_source, sources, settings)

    def required(self, pieces: list[Piece], levels: list[dict[str, Setting]]) -> None:
        from .methods import REQUIRED

        for parameter in self.method.parameters.values():
            if parameter.default is not REQUIRED or any(parameter.name in level for level in levels):
                continue
            for piece in pieces:
                if parameter.name in piece.settings:
                    continue
                if not parameter.per_model:
                    self.report(f"{self.method.name} needs {parameter.name}", ("parameters",), _add(parameter))
                    break
                for source in piece.sources:
                    if parameter.name not in source.settings:
                        self.report(
                            f"{self.method.name} needs a {parameter.name} for model {source.ref}",
                            source.path,
                            _add(parameter),
                        )

    def top_level(self) -> None:
        recipe = self.recipe
        for key in ("dtype", "out_dtype"):
            dtype = (getattr(recipe, key) or "float32").removeprefix("torch.")
            if dtype not in _DTYPES:
                self.report(
                    f"unknown {key} {dtype!r}{did_you_mean(dtype, _DTYPES)}", (key,), f"one of {', '.join(_DTYPES)}"
                )
        if recipe.base_model:
            self.check_ref(recipe.base_model, ("base_model",))
        if self.method.base == "required" and self.base is None:
            self.report(f"{self.method.name} needs a base model", (), "add base_model:")
        if recipe.chat_template is not None:
            self.report(
                "chat_template is not supported",
                ("chat_template",),
                "remove it (the base model's template is copied) and edit tokenizer_config.json afterwards",
            )
        given = recipe.tokenizer_source
        path: Path = ("tokenizer_source",)
        if recipe.tokenizer is not None:
            given, path = recipe.tokenizer.source, ("tokenizer", "source")
            if recipe.tokenizer.tokens or recipe.tokenizer.pad_to_multiple_of:
                self.report(
                    "editing tokens is not supported", ("tokenizer",), "keep only source: base, or remove tokenizer:"
                )
        if given not in (None, "base") and str(given) != str(self.base):
            self.report(
                f"the tokenizer can only be copied from the base model, not made from {given!r}",
                path,
                "write tokenizer_source: base if all vocabularies are the same; otherwise bring the models to one "
                "vocabulary first",
            )

    def compile(self) -> Compiled:
        recipe = self.recipe
        path: Path = ()
        self.top_level()
        levels = [self.settings(recipe.parameters, ("parameters",), of_model=False)]
        given = [key for key in ("models", "slices", "modules") if getattr(recipe, key) is not None]
        if len(given) != 1:
            said = "says nothing about its models" if not given else f"has both {' and '.join(given)}"
            self.report(f"the recipe {said}", (), "give exactly one of models:, slices: or modules:")
        body: Any = recipe
        if given == ["modules"]:
            modules = recipe.modules or {}
            if len(modules) != 1:
                self.report(
                    f"{len(modules)} modules are given; one is supported", ("modules",), "merge them one by one"
                )
            for name, body in modules.items():
                path = ("modules", name)
                levels.insert(0, self.settings(body.parameters, (*path, "parameters"), of_model=False))
                if (body.models is None) == (body.slices is None):
                    self.report("a module has either models or slices", path, "give exactly one of models: or slices:")
        pieces = []
        if given and body.models is not None:
            pieces.append(self.piece(body.models, path, "models", self.base, {}))
            self.inputs = [s.ref for s in pieces[0].sources]
            for i, source in enumerate(pieces[0].sources):
                source.model = i
        elif given and body.slices is not None:
            pieces = list(self.slices(body.slices, (*path, "slices"), self.base))
        self.required(pieces, levels)
        if self.problems:
            raise BadInput.collect(self.problems, f"{self.marks.source or 'the call'}")
        return Compiled(
            self.method, self.marks, pieces, levels, self.base, tuple(self.inputs), any(s.layers for p in pieces for s in p.sources),
            self.notes,
        )  # fmt: skip

    def slices(self, slices: Sequence[Any], path: Path, base: ModelRef | None) -> Iterator[Piece]:
        if not slices:
            self.report("slices is empty", path, "give at least one slice with its sources")
        for i, one in enumerate(slices):
            at = (*path, i)
            if one.base_model is not None and one.base_model != base:
                self.report(
                    "a slice with a base model of its own is not supported",
                    (*at, "base_model"),
                    "use one base_model: at the top",
                )
            if one.residual_weight is not None:
                self.report("residual_weight is not supported", (*at, "residual_weight"), "remove it")
            settings = self.settings(one.parameters, (*at, "parameters"), of_model=False)
            piece = self.piece(one.sources, at, "sources", base, settings)
            for source in piece.sources:
                if source.ref not in self.inputs:
                    self.inputs.append(source.ref)
                source.model = self.inputs.index(source.ref)
            yield piece


def _add(parameter: Parameter) -> str:
    return (
        f"add {parameter.name}: to its parameters"
        if parameter.per_model
        else f"add {parameter.name}: under parameters:"
    )


def _base_of_slices(recipe: Recipe) -> ModelRef | None:
    """mergekit also takes the base from the slices; one base for the whole merge is what we support."""
    modules = [m.slices for m in (recipe.modules or {}).values()]
    bases = [one.base_model for slices in (recipe.slices, *modules) for one in slices or () if one.base_model]
    return bases[0] if bases else None


def compile_recipe(recipe: Recipe, marks: Marks) -> Compiled:
    """Check everything that needs no checkpoint. Raises BadInput that lists all problems."""
    from . import methods

    try:
        method = methods.get(recipe.merge_method)
    except BadInput as error:
        raise BadInput(error.message, where=marks.where(("merge_method",)), remedy=error.remedy) from None
    return _Compiler(recipe, method, marks).compile()

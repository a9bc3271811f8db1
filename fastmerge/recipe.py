"""Recipes: what to merge, how, with which parameters. mergekit's YAML is accepted as it is for the methods we have.

A :class:`Recipe` is checked whole when it is made, before any checkpoint is opened: unknown keys, unknown methods,
values out of range and wrong numbers of models are reported together, each with its line. :meth:`Recipe.resolve` then
needs only tensor names to say, for every output tensor, which tensors it is made of and with which parameters.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from . import _recipe_yaml
from ._recipe_check import Compiled, compile_recipe
from ._recipe_resolve import TensorPlan, resolve
from ._recipe_yaml import Marks, Path
from .errors import BadInput, did_you_mean

__all__ = ["Compiled", "ModelRef", "Recipe", "TensorPlan"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelRef(BaseModel):
    """A checkpoint: a folder or hub id, optionally ``@revision`` and ``+lora``, as text or as mergekit's mapping."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    revision: str | None = None
    lora: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        if isinstance(value, (str, os.PathLike)):
            return _split(os.fspath(value), whole=isinstance(value, os.PathLike))
        if isinstance(value, dict) and "model" in value:
            inner = value["model"]
            out = dict(inner) if isinstance(inner, dict) else _split(str(inner))
            lora = value.get("lora")
            out["lora"] = out.get("lora") or (lora.get("path") if isinstance(lora, dict) else lora)
            # override_architecture has no meaning where tensors are merged by name
            out.update({k: v for k, v in value.items() if k not in ("model", "lora", "override_architecture")})
            return out
        return value

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.path}{revision}{f'+{self.lora}' if self.lora else ''}"


def _split(text: str, *, whole: bool = False) -> dict[str, Any]:
    if whole or os.path.exists(text):  # a folder may well have "@" or "+" in its name
        return {"path": text}
    model, _, lora = text.partition("+")
    path, _, revision = model.partition("@")
    return {"path": path, "revision": revision or None, "lora": lora or None}


class ModelEntry(_Strict):
    """One of ``models``."""

    model: ModelRef
    parameters: dict[str, Any] = Field(default_factory=dict)


class SliceSource(_Strict):
    """One of a slice's ``sources``: layers [a, b) of a model."""

    model: ModelRef
    layer_range: tuple[int, int]
    parameters: dict[str, Any] = Field(default_factory=dict)


class Slice(_Strict):
    """One of ``slices``: consecutive layers of the output."""

    sources: list[SliceSource]
    base_model: ModelRef | None = None
    residual_weight: float | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Module(_Strict):
    """The value of one of ``modules``."""

    models: list[ModelEntry] | None = None
    slices: list[Slice] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


class Tokenizer(_Strict):
    """mergekit's ``tokenizer`` mapping."""

    source: Any = None
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class Recipe(_Strict):
    """A merge. Make one with :meth:`load`, :meth:`parse` or :meth:`from_call`: these check it whole.

    ``dtype`` and ``out_dtype`` both name the dtype that is stored (``out_dtype`` wins; without either, the base's is
    kept). Arithmetic is float32 whatever is stored, and float64 where an input is.
    """

    merge_method: str
    base_model: ModelRef | None = None
    models: list[ModelEntry] | None = None
    slices: list[Slice] | None = None
    modules: dict[str, Module] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    seed: int = 0

    _marks: Marks = Marks()
    _text: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return _without_nulls(value) if isinstance(value, dict) else value

    # ---- making one

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a YAML file. Raises BadInput, with lines, for everything that can be wrong without models."""
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read()
        except FileNotFoundError:
            raise BadInput(f"there is no recipe {os.fspath(path)!r}", remedy="check the path") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"recipe {os.fspath(path)!r} can not be read: {error}", remedy="save it as UTF-8 text"
            ) from None
        return cls.parse(text, source=os.fspath(path))

    @classmethod
    def parse(cls, text: str, *, source: str = "<recipe>") -> Recipe:
        """The recipe in a YAML text; `source` is what messages call it."""
        data, marks = _recipe_yaml.load(text, source)
        if not isinstance(data, dict):
            raise BadInput(
                "a recipe is a mapping of keys to values" if data is not None else "the recipe is empty",
                where=source,
                remedy="start with merge_method: and models:",
            )
        recipe = cls._validated(data, marks)
        recipe._text = text
        return recipe

    @classmethod
    def from_call(
        cls,
        method: str,
        base: ModelRef | str | os.PathLike[str] | None,
        models: Sequence[ModelRef | str | os.PathLike[str]],
        parameters: Mapping[str, Any] | None = None,
        *,
        out_dtype: str | None = None,
        seed: int = 0,
    ) -> Recipe:
        """The recipe of ``fm.merge``. A per-model parameter takes a scalar for all or a list with one per model.

        Parameter names are the recipe's; ``lambda`` may be spelled ``lambda_``.
        """
        from . import methods

        chosen = methods.get(method)
        shared: dict[str, Any] = {}
        own: list[dict[str, Any]] = [{} for _ in models]
        for key, value in (parameters or {}).items():
            name = key.rstrip("_")
            value = value.tolist() if hasattr(value, "tolist") else value
            known = chosen.parameters.get(chosen.aliases.get(name, name))
            if known is None or not known.per_model or not isinstance(value, (list, tuple)) or _conditional(value):
                shared[name] = list(value) if isinstance(value, tuple) else value
                continue
            if len(value) != len(models):
                raise BadInput(
                    f"{name} has {len(value)} values for {len(models)} models",
                    where=f"{method}(…, {name}=)",
                    remedy="give one value for all models, or one per model in their order",
                )
            for parameters_of_one, one in zip(own, value, strict=True):
                parameters_of_one[name] = one
        return cls._validated(
            {
                "merge_method": method,
                "base_model": base,
                "models": [{"model": m, "parameters": p} for m, p in zip(models, own, strict=True)],
                "parameters": shared,
                "out_dtype": out_dtype,
                "seed": seed,
            },
            Marks(),
        )

    @classmethod
    def _validated(cls, data: dict[str, Any], marks: Marks) -> Recipe:
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            problems = [_problem(e, marks) for e in error.errors(include_url=False)]
            raise BadInput.collect(problems, "the recipe") from None
        recipe._marks = marks
        recipe.base_model = recipe.compiled.base  # mergekit also takes it from the slices
        return recipe

    # ---- asking it

    @functools.cached_property
    def compiled(self) -> Compiled:
        """The checked form. Raises BadInput that lists every problem."""
        return compile_recipe(self, self._marks)

    @property
    def method(self) -> Any:
        """The :class:`fastmerge.methods.Method`."""
        return self.compiled.method

    @property
    def base(self) -> ModelRef | None:
        """The base model, if one is named."""
        return self.base_model

    @property
    def inputs(self) -> tuple[ModelRef, ...]:
        """The models besides the base; ``TensorPlan.models`` counts in these."""
        return self.compiled.inputs

    @property
    def template(self) -> ModelRef:
        """The model whose tensor names, config and tokenizer the output takes: the base, else the first model."""
        return self.base or self.inputs[0]

    @property
    def stored_dtype(self) -> str | None:
        """The dtype asked for, or None to keep the template's."""
        chosen = self.out_dtype or self.dtype
        return chosen.removeprefix("torch.") if chosen else None

    @property
    def notes(self) -> list[str]:
        """What was accepted but has no effect, in sentences."""
        return self.compiled.notes

    def resolve(self, names: Sequence[str], others: Mapping[ModelRef, Sequence[str]] | None = None) -> list[TensorPlan]:
        """One plan per output tensor, everything evaluated.

        Args:
            names: the template's tensor names.
            others: names of other models, where known; slices then check their layer ranges against them.
        Raises: BadInput naming parameter, model and line for a tensor without a value for a required parameter, and
            for layer ranges that leave the model.
        """
        return resolve(self.compiled, self.template, names, others or {})

    def layer_sources(self) -> list[tuple[ModelRef, int]] | None:
        """Per output layer: the model and layer it comes from (base, else first source); None without slices."""
        return self.compiled.layer_sources(self.template)

    def to_yaml(self) -> str:
        """The recipe as YAML that :meth:`parse` reads: the user's own text where there is one."""
        if self._text is not None:
            return self._text
        data = self.model_dump(exclude_defaults=True, exclude_none=True, mode="python")
        return yaml.safe_dump(_plain(data), sort_keys=False, allow_unicode=True, width=1000)


def _conditional(value: Sequence[Any]) -> bool:
    return bool(value) and all(isinstance(v, dict) for v in value)


def _without_nulls(value: Any) -> Any:
    """``models:`` with nothing behind it is the same as no ``models`` at all."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Dumped models as YAML writes them: references as text, no empty parameters."""
    if isinstance(value, dict):
        if "path" in value and set(value) <= {"path", "revision", "lora"}:
            return str(ModelRef.model_construct(**value))
        return {k: _plain(v) for k, v in value.items() if v != {}}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---- pydantic's complaints, in our words

_LEVELS: dict[str, type[BaseModel]] = {
    "models": ModelEntry, "slices": Slice, "sources": SliceSource, "modules": Module, "tokenizer": Tokenizer,
    "model": ModelRef, "base_model": ModelRef,
}  # fmt: skip
_KINDS = {
    "list_type": "a list", "dict_type": "a mapping", "string_type": "text (put quotes around it)",
    "int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
    "float_type": "a number", "float_parsing": "a number", "model_type": "a mapping",
    "model_attributes_type": "a mapping", "tuple_type": "two whole numbers [first, end)",
    "too_long": "two whole numbers [first, end)",
}  # fmt: skip


def _problem(error: Any, marks: Marks) -> BadInput:
    path: Path = tuple(error["loc"])
    name = path[-1] if path else ""
    parent = next((p for p in reversed(path[:-1]) if isinstance(p, str) and p in _LEVELS), None)
    if len(path) >= 3 and path[-3] == "modules":
        parent = "modules"
    level = _LEVELS[parent] if parent else Recipe
    if error["type"] == "extra_forbidden":
        known = list(level.model_fields)
        hint = did_you_mean(str(name), known)
        remedy = f"the keys here are {', '.join(known)}"
        from . import methods

        if any(str(name) in methods.get(m).parameters for m in methods.names()):
            hint, remedy = "", f"{name} is a parameter of a method: write it under parameters:"
        return BadInput(f"unknown key {str(name)!r}{hint}", where=marks.where(path), remedy=remedy)
    if error["type"] == "missing":
        # a tuple's missing element is a wrong length, anything else a missing key
        if isinstance(name, int):
            return BadInput(
                f"{path[-2]} must be {_KINDS['tuple_type']}", where=marks.where(path[:-1]), remedy=_write(path[-2])
            )
        return BadInput(f"{name} is missing", where=marks.where(path[:-1]), remedy=f"add {name}:")
    wanted = _KINDS.get(error["type"])
    what = _recipe_yaml.dotted(path[-1:]) or "the recipe"
    said = f"must be {wanted}, not {error['input']!r}" if wanted else f"can not be used: {error['msg']}"
    return BadInput(f"{what} {said}", where=marks.where(path), remedy=_write(name, wanted))


def _write(key: str | int, wanted: str | None = None) -> str:
    if key == "layer_range":
        return "write layer_range: [first, end), for example [0, 16] for the first 16 layers"
    return f"write {wanted} there" if wanted else "compare it with the recipes in README.md"

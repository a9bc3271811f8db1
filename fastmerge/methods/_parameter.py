"""Annotations of a method's signature, and the recipe parameters they stand for."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from torch import Tensor

T = TypeVar("T")


class _Space:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class _PerModel:
    def __repr__(self) -> str:
        return "PerModel"


@dataclass(frozen=True)
class Range:
    """Bounds of a numeric parameter, inclusive."""

    minimum: float = -math.inf
    maximum: float = math.inf


@dataclass(frozen=True)
class Help:
    """One line about a parameter, shown by ``fastmerge methods NAME``."""

    text: str


Weight = Annotated[Tensor, _Space("weight")]
Delta = Annotated[Tensor, _Space("delta")]
Models = Annotated[Sequence[Tensor], _Space("models")]
Deltas = Annotated[Sequence[Tensor], _Space("deltas")]
PerModel = Annotated[T, _PerModel()]
Density = Annotated[float, Range(0.0, 1.0)]


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


@dataclass(frozen=True)
class Parameter:
    """One configuration key of a method."""

    name: str  # as in recipes: "lambda", not "lambda_"
    type: type  # float, int, bool or str
    per_model: bool = False
    default: Any = REQUIRED
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    optional: bool = False  # None is a value
    many: bool = False  # a list of `type`
    help: str = ""

    @property
    def argument(self) -> str:
        """The keyword of the method's function."""
        return self.name + "_" if self.name in ("lambda",) else self.name

    def check(self, value: Any) -> Any:
        """The value converted to the parameter's type; raises ValueError with one sentence saying what is wrong."""
        if value is None and self.optional:
            return None
        if self.many:
            if not isinstance(value, (list, tuple)):
                value = [value]
            return [self._check_one(v) for v in value]
        return self._check_one(value)

    def _check_one(self, value: Any) -> Any:
        if self.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{self.name} must be true or false, not {value!r}")
            return value
        if self.type is str:
            if not isinstance(value, str) or (self.choices and value not in self.choices):
                wanted = f"one of {', '.join(self.choices)}" if self.choices else "a string"
                raise ValueError(f"{self.name} must be {wanted}, not {value!r}")
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.name} must be a number, not {value!r}")
        if self.type is int and value != int(value):
            raise ValueError(f"{self.name} must be a whole number, not {value!r}")
        if not math.isfinite(value) or not self.minimum <= value <= self.maximum:
            low, high = self.minimum, self.maximum
            if math.isinf(low) and math.isinf(high):
                raise ValueError(f"{self.name} must be finite, not {value!r}")
            bounds = (
                f">= {low:g}" if math.isinf(high) else f"<= {high:g}" if math.isinf(low) else f"in [{low:g}, {high:g}]"
            )
            raise ValueError(f"{self.name} must be {bounds}, not {value!r}")
        return int(value) if self.type is int else float(value)


_SCALARS = (bool, int, float, str)


def parameter_of(name: str, annotation: Any, default: Any) -> Parameter:
    recipe_name = name.rstrip("_")
    per_model, low, high, text, optional, many = False, -math.inf, math.inf, "", False, False
    choices: tuple[str, ...] = ()
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation, *extra = get_args(annotation)
            for e in extra:
                if isinstance(e, _PerModel):
                    per_model = True
                elif isinstance(e, Range):
                    low, high = e.minimum, e.maximum
                elif isinstance(e, Help):
                    text = e.text
        elif origin in (typing.Union, types.UnionType):
            options = [a for a in get_args(annotation) if a is not type(None)]
            optional = optional or len(options) < len(get_args(annotation))
            if len(options) != 1:
                raise TypeError(f"parameter {name}: a union of {options} has no single recipe type")
            annotation = options[0]
        elif origin is list:
            many, annotation = True, get_args(annotation)[0]
        elif origin is Literal:
            choices = tuple(str(c) for c in get_args(annotation))
            annotation = str
        else:
            break
    if annotation not in _SCALARS:
        raise TypeError(f"parameter {name}: {annotation!r} is not float, int, bool, str, a Literal or a list of those")
    return Parameter(
        recipe_name,
        annotation,
        per_model,
        REQUIRED if default is inspect.Parameter.empty else default,
        low,
        high,
        choices,
        optional,
        many,
        text,
    )


def space_of(annotation: Any) -> str:
    for candidate in (annotation, *get_args(annotation)):
        for extra in getattr(candidate, "__metadata__", ()):
            if isinstance(extra, _Space):
                return extra.name
    return ""

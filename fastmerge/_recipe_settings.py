"""Parameter settings of a recipe: a scalar, a gradient over the layers, or a list of {filter, value}."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._recipe_yaml import Path
from .errors import did_you_mean

if TYPE_CHECKING:
    from .methods import Parameter

Report = Callable[..., None]  # report(message, path, remedy=None)
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


@dataclass(frozen=True)
class Gradient:
    """Values at equal distances over the layers, interpolated linearly (numbers) or held until the next one."""

    values: tuple[Any, ...]

    def at(self, t: float) -> Any:
        last = len(self.values) - 1
        at = min(max(t, 0.0), 1.0) * last
        i = min(math.floor(at), max(last - 1, 0))
        if t >= 1.0 or last == 0:
            return self.values[last]
        low, high = self.values[i], self.values[i + 1]
        return (1.0 - (at - i)) * low + (at - i) * high if isinstance(low, float) else low


@dataclass(frozen=True)
class Setting:
    """What one place of the recipe says about one parameter: cases in order, the first whose filter matches counts."""

    cases: tuple[tuple[str | None, Any], ...]
    path: Path

    def at(self, name: str, t: float) -> Any:
        """The value for tensor `name` at depth t in [0, 1], or MISSING when no filter matches."""
        for pattern, value in self.cases:
            if pattern is None or pattern in name:
                return value.at(t) if isinstance(value, Gradient) else value
        return MISSING


def parse(parameter: Parameter, raw: Any, path: Path, report: Report) -> Setting | None:
    """The checked setting, or None after reporting everything wrong with it."""
    if isinstance(raw, dict):
        return _cases(parameter, [raw], path, report, lambda _: path)
    if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        return _cases(parameter, raw, path, report, lambda i: (*path, i))
    value = _value(parameter, raw, path, report)
    return None if value is MISSING else Setting(((None, value),), path)


def _cases(
    parameter: Parameter, raw: list[Any], path: Path, report: Report, path_of: Callable[[int], Path]
) -> Setting | None:
    cases: list[tuple[str | None, Any]] = []
    good = True
    for i, item in enumerate(raw):
        at = path_of(i)
        if not isinstance(item, dict):
            report(f"{parameter.name} mixes plain values and {{filter, value}}", at, "give every entry a value:")
            good = False
            continue
        for key in item:
            if key not in ("filter", "value"):
                hint = did_you_mean(key, ("filter", "value"))
                report(f"unknown key {key!r}{hint}", (*at, key), "an entry has a value: and, optionally, a filter:")
                good = False
        if "value" not in item:
            report(f"an entry of {parameter.name} has no value", at, "add value:")
            good = False
            continue
        pattern = item.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            report(f"filter must be text, not {pattern!r}", (*at, "filter"), "put quotes around it")
            good = False
        value = _value(parameter, item["value"], (*at, "value"), report)
        good = good and value is not MISSING
        cases.append((None if pattern == "*" else pattern, value))
    return Setting(tuple(cases), path) if good else None


def _value(parameter: Parameter, raw: Any, path: Path, report: Report) -> Any:
    if isinstance(raw, (list, tuple)) and not parameter.many:
        if not raw:
            report(f"{parameter.name} is an empty list", path, "give a number, or a list of at least one")
            return MISSING
        values = [_scalar(parameter, item, (*path, i), report) for i, item in enumerate(raw)]
        return MISSING if any(v is MISSING for v in values) else Gradient(tuple(values))
    return _scalar(parameter, raw, path, report)


def _scalar(parameter: Parameter, raw: Any, path: Path, report: Report) -> Any:
    try:
        if parameter.many:
            return parameter.check(
                [_as_type(parameter.type, v) for v in (raw if isinstance(raw, (list, tuple)) else [raw])]
            )
        return parameter.check(_as_type(parameter.type, raw))
    except (ValueError, OverflowError) as error:
        report(str(error), path, _advice(parameter))
        return MISSING


def _advice(parameter: Parameter) -> str:
    """What to write for a parameter, when what was written is not that."""
    if parameter.type is bool:
        what = "write true or false"
    elif parameter.type is str:
        what = f"write one of {', '.join(parameter.choices)}" if parameter.choices else "write text, in quotes"
    else:
        what = "write a whole number" if parameter.type is int else "write a number"
        low, high = parameter.minimum, parameter.maximum
        if math.isfinite(low) and math.isfinite(high):
            what += f" from {low:g} to {high:g}"
        elif math.isfinite(low) or math.isfinite(high):
            what += f" >= {low:g}" if math.isfinite(low) else f" <= {high:g}"
        else:
            what += " that is finite"
    default = parameter.default
    if isinstance(default, (bool, int, float, str)):
        shown = (
            str(default).lower()
            if isinstance(default, bool)
            else f"{default:g}"
            if parameter.type is float
            else default
        )
        what += f", or leave {parameter.name} out for {shown}"
    return f"{what} ({parameter.name}: {parameter.help})" if parameter.help else what


def _as_type(kind: type, raw: Any) -> Any:
    """What YAML and arrays write differently: 1e-5 is text in YAML 1.1, mergekit takes 0 and 1 for false and true."""
    raw = raw.tolist() if hasattr(raw, "tolist") else raw  # numpy and torch scalars
    if kind is bool:
        word = raw.lower() if isinstance(raw, str) else raw
        if word in _TRUE or (word == 1 and not isinstance(word, str)):
            return True
        if word in _FALSE or (word == 0 and not isinstance(word, str)):
            return False
    if kind in (int, float) and isinstance(raw, str):
        try:
            return float(raw)
        except ValueError:
            return raw
    return raw

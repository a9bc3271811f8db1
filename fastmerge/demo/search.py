"""Choosing a method's parameters for the demo: on calibration images only, one parameter after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..methods import REQUIRED, Method

Parameters = dict[str, Any]
PASSES = 2  # over the axes: the second one revisits the scale with the densities the first one chose

# What is tried for a parameter of this name, unless the method says otherwise below. The order is that of the search.
AXES: dict[str, tuple[Any, ...]] = {
    "lambda": (0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
    "density": (0.2, 0.5, 0.8),
    "cutoff": (0.02, 0.05, 0.1, 0.2),
    "select_topk": (0.1, 0.2, 0.5, 1.0),
    "t": (0.3, 0.5, 0.7),
}
AVERAGED = (0.5, 1.0, 1.5, 2.0)  # scales of a sum that is divided by its weights
METHOD_AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "fr": {"lambda": AVERAGED},  # its default policy's coefficients sum to one
    "della": {"density": (0.3, 0.5, 0.7)},  # density ± epsilon lies inside (0, 1)
    "della_linear": {"density": (0.3, 0.5, 0.7)},
    "nearswap": {"t": (0.0003, 0.001, 0.003, 0.01)},  # a distance between weights
}


def axes(method: Method) -> dict[str, tuple[Any, ...]]:
    """The parameters of `method` that are searched, with their values."""
    found = {name: values for name, values in AXES.items() if name in method.parameters}
    normalize = method.parameters.get("normalize")
    if "lambda" in found and normalize is not None and normalize.default is True:
        found["lambda"] = AVERAGED
    found.update(METHOD_AXES.get(method.name, {}))
    return found


def start(method: Method, values: Mapping[str, tuple[Any, ...]]) -> Parameters:
    """The parameters the search starts from: defaults, weight 1, and the middle of an axis without a default."""
    chosen: Parameters = {}
    for name, parameter in method.parameters.items():
        if name == "weight" and parameter.default is REQUIRED:
            chosen[name] = 1.0
        elif name in values and (parameter.default is REQUIRED or parameter.default not in values[name]):
            chosen[name] = values[name][len(values[name]) // 2]
    return chosen


def unknown(method: Method) -> list[str]:
    """The required parameters that the demo has no values for."""
    known = {"weight", *axes(method)}
    return [name for name, p in method.parameters.items() if p.default is REQUIRED and name not in known]


def search(method: Method, score: Callable[[Parameters], float]) -> tuple[Parameters, int]:
    """The best parameters by `score` (higher is better) along each axis in turn, and how many were tried.

    Equal scores stay with what was tried first, so the result does not depend on anything but the scores.
    """
    values = axes(method)
    best = start(method, values)
    scores: dict[str, float] = {}

    def rate(parameters: Parameters) -> float:
        key = repr(sorted(parameters.items()))
        if key not in scores:
            scores[key] = score(parameters)
        return scores[key]

    if values:
        for _ in range(PASSES if len(values) > 1 else 1):
            for name, candidates in values.items():
                for value in candidates:
                    if rate({**best, name: value}) > rate(best):
                        best = {**best, name: value}
    return best, len(scores)

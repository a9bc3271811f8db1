"""Named settings, and the decorator that lets an explicit argument win over them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import BadInput, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])

HARD: dict[str, dict[str, Any]] = {
    # For pools of unknown use: the steepest vertex of each layer, and a step of its own for each layer.
    "robust": {"metric": "slope", "granularity": "layer", "step": "short", "init": "base", "iterations": 10},
    # The authors' code: cosines over raw weights, a tensor whose best cosine is not negative moves towards zero, the
    # start is one of the candidates.
    "published": {
        "metric": "cosine",
        "granularity": "layer",
        "zero_if_ascent": True,
        "pool_init": True,
        "init": "merge",
        "iterations": 10,
        "step": "harmonic",
        "step_size": 0.1,
        "scale": 0.29,
    },
    # FusionBench's fw_hard: one choice for the model, no zero vertex.
    "fusion_bench": {
        "metric": "cosine",
        "granularity": "model",
        "zero_if_ascent": False,
        "pool_init": True,
        "init": "merge",
        "iterations": 10,
        "step": "harmonic",
        "step_size": 0.1,
        "scale": 0.3,
    },
}
SOFT: dict[str, dict[str, Any]] = {
    "robust": {"metric": "slope", "constraint": "capped", "init": "base", "iterations": 3, "inner_steps": 5},
    # FusionBench's fw_soft, the only published soft variant: Adam on unconstrained coefficients.
    "fusion_bench": {
        "metric": "cosine",
        "granularity": "model",
        "selection": "tasks",
        "init": "base",
        "iterations": 10,
        "constraint": "none",
        "optimizer": "adam",
        "inner_steps": 500,
        "inner_lr": 1e-3,
        "start": (0.3, 1e-8),
    },
}
SOFT["published"] = SOFT["fusion_bench"]


def settings(presets: Mapping[str, Mapping[str, Any]], preset: str | None) -> Mapping[str, Any]:
    """What a preset sets; raises BadInput for one that is not known."""
    if preset is not None and preset not in presets:
        raise BadInput(
            f"unknown preset {preset!r}{did_you_mean(preset, presets)}", remedy=f"one of {', '.join(sorted(presets))}"
        )
    return presets[preset] if preset else {}


def with_presets(presets: Mapping[str, Mapping[str, Any]]) -> Callable[[F], F]:
    """`preset="name"` replaces the defaults; arguments that the caller gives stay as given."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, preset: str | None = None, **given: Any) -> Any:
            return function(*args, preset=preset, **{**settings(presets, preset), **given})

        return run  # type: ignore[return-value]

    return wrap

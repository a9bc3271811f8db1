"""The merge methods, one file each. ``names()`` lists them, ``get(name)`` gives one."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

from ..errors import BadInput, did_you_mean
from ._method import (
    REQUIRED,
    Context,
    Delta,
    Deltas,
    Density,
    Header,
    Help,
    Method,
    Models,
    Parameter,
    PerModel,
    Range,
    TensorStream,
    Weight,
    method,
    registered,
)
from .arcee_fusion import arcee_fusion
from .breadcrumbs import breadcrumbs, breadcrumbs_ties
from .dare import dare_linear, dare_ties
from .della import della, della_linear
from .fr import fr
from .frank_wolfe import frank_wolfe, frank_wolfe_soft
from .free import free
from .karcher import karcher
from .linear import linear
from .model_stock import model_stock
from .mudsc import mudsc
from .multislerp import multislerp
from .nearswap import nearswap
from .nuslerp import nuslerp
from .passthrough import passthrough
from .ram import ram, ramplus_tl
from .sce import sce
from .slerp import slerp
from .task_arithmetic import task_arithmetic
from .ties import ties

__all__ = [
    "REQUIRED",
    "Context",
    "Delta",
    "Deltas",
    "Density",
    "Header",
    "Help",
    "Method",
    "Models",
    "Parameter",
    "PerModel",
    "Range",
    "TensorStream",
    "Weight",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "fr",
    "frank_wolfe",
    "frank_wolfe_soft",
    "free",
    "get",
    "karcher",
    "linear",
    "method",
    "model_stock",
    "mudsc",
    "multislerp",
    "names",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]


@functools.cache
def _load_entry_points() -> None:
    for point in entry_points(group="fastmerge.methods"):
        point.load()  # importing it runs its @method decorators


def names() -> list[str]:
    """Names of all methods, users' own (entry points ``fastmerge.methods``) included."""
    _load_entry_points()
    return sorted(registered())


def get(name: str) -> Method:
    """The method called `name`; raises BadInput with the nearest names when there is none."""
    _load_entry_points()
    if name in registered():
        return registered()[name]
    raise BadInput(
        f"unknown merge method {name!r}{did_you_mean(name, registered())}",
        remedy=f"the methods are {', '.join(names())}",
    )

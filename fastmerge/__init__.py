"""fastmerge: an accelerated engine that merges trained neural networks into one.

Names are imported when they are first used: ``import fastmerge`` costs nothing, ``fastmerge.merge`` loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import experts, methods, ops, structure
    from ._dispatch import BackendUnavailable, use_backend
    from ._doctor import doctor
    from .engine import run
    from .errors import BadInput, FastmergeError, Interrupted
    from .experts import free
    from .fw import FrankWolfeResult, frank_wolfe, frank_wolfe_soft
    from .gradients import gradient
    from .merging import merge
    from .methods import method
    from .recipe import Recipe
    from .report import Report
    from .structure import align, mudsc

_HOME = {
    "BackendUnavailable": "_dispatch",
    "BadInput": "errors",
    "FastmergeError": "errors",
    "FrankWolfeResult": "fw",
    "Interrupted": "errors",
    "Recipe": "recipe",
    "Report": "report",
    "align": "structure",
    "doctor": "_doctor",
    "experts": None,
    "frank_wolfe": "fw",
    "frank_wolfe_soft": "fw",
    "free": "experts",
    "gradient": "gradients",
    "merge": "merging",
    "method": "methods",
    "methods": None,
    "mudsc": "structure",
    "ops": None,
    "run": "engine",
    "structure": None,
    "use_backend": "_dispatch",
}

__all__ = [
    "BackendUnavailable",
    "BadInput",
    "FastmergeError",
    "FrankWolfeResult",
    "Interrupted",
    "Recipe",
    "Report",
    "align",
    "doctor",
    "experts",
    "frank_wolfe",
    "frank_wolfe_soft",
    "free",
    "gradient",
    "merge",
    "method",
    "methods",
    "mudsc",
    "ops",
    "run",
    "structure",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastmerge' has no attribute {name!r}")
    home = _HOME[name]
    module = importlib.import_module(f".{home or name}", __name__)
    value = module if home is None else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

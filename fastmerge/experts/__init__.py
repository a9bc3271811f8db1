"""FREE-Merging: an FR backbone, one small expert file per task, a router, and a module that serves them.

All of it from Python: :func:`free`. Extraction and the meaning of μ: :mod:`.extract`; the file format: :mod:`.storage`; serving: :mod:`.runtime`.
"""

from .extract import extract
from .making import Free, free
from .router import Evaluation, Router, evaluate, softmax_mixture, train
from .runtime import FreeModel
from .storage import Expert, Sparse, load, load_folder, save

__all__ = [
    "Evaluation",
    "Expert",
    "Free",
    "FreeModel",
    "Router",
    "Sparse",
    "evaluate",
    "extract",
    "free",
    "load",
    "load_folder",
    "save",
    "softmax_mixture",
    "train",
]

"""Frank-Wolfe merging (FW-Merging, arXiv:2503.12649): hard and soft, over any number of candidates that stream."""

from .hard import frank_wolfe
from .result import FrankWolfeResult
from .simplex import project_capped, project_simplex
from .soft import frank_wolfe_soft
from .trace import Trace

__all__ = ["FrankWolfeResult", "Trace", "frank_wolfe", "frank_wolfe_soft", "project_capped", "project_simplex"]

"""Network structure: permutation specs, tracing, alignment and MuDSC merging."""

from .alignment import Alignment, Sweep, align
from .architectures import names as architectures
from .naming import named_spec
from .permutation import AxisSpec, Group, PermutationSpec
from .trace import spec_for
from .verify import check_spec

__all__ = [
    "Alignment",
    "AxisSpec",
    "Group",
    "PermutationSpec",
    "Sweep",
    "align",
    "architectures",
    "check_spec",
    "named_spec",
    "spec_for",
]

"""Network structure: permutation specs, tracing, alignment and MuDSC merging."""

from .permutation import AxisSpec, Group, PermutationSpec
from .trace import spec_for
from .verify import check_spec

__all__ = ["AxisSpec", "Group", "PermutationSpec", "check_spec", "spec_for"]

"""Network structure: permutation specs, tracing, alignment and MuDSC merging."""

from .activation import ActivationStatistics, activation_statistics
from .alignment import Alignment, Sweep, align
from .architectures import names as architectures
from .merging import MudscResult, average, mudsc, reset_batchnorm
from .naming import named_spec
from .partial import PartialZip, PartialZipResult, partial_zip, split
from .permutation import AxisSpec, Group, PermutationSpec
from .trace import spec_for
from .verify import check_spec
from .zipping import ZipAlignment

__all__ = [
    "ActivationStatistics",
    "Alignment",
    "AxisSpec",
    "Group",
    "MudscResult",
    "PartialZip",
    "PartialZipResult",
    "PermutationSpec",
    "Sweep",
    "ZipAlignment",
    "activation_statistics",
    "align",
    "architectures",
    "average",
    "check_spec",
    "mudsc",
    "named_spec",
    "partial_zip",
    "reset_batchnorm",
    "spec_for",
    "split",
]

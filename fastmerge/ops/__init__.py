"""The operators: tensor arithmetic that knows nothing of models. One line each; see the modules for the law."""

from .consensus_merge import consensus_merge
from .highpass_filter import highpass_filter
from .random_mask import random_mask
from .threshold import Threshold, Window, topk_thresholds
from .topk_mask import topk_mask
from .weighted_sum import weighted_sum

__all__ = [
    "Threshold",
    "Window",
    "consensus_merge",
    "highpass_filter",
    "random_mask",
    "topk_mask",
    "topk_thresholds",
    "weighted_sum",
]

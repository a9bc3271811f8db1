"""The operators: tensor arithmetic that knows nothing of models. One line each; see the modules for the law."""

from .abs_sum import abs_sum
from .arcee_divergence import arcee_divergence
from .arcee_importance import arcee_importance
from .arcee_merge import arcee_merge
from .consensus_merge import consensus_merge
from .expert_gather import expert_gather
from .expert_scatter import expert_scatter
from .fw_lmo import fw_lmo
from .fw_products import fw_products
from .fw_step import fw_step
from .gram_blocks import gram, gram_blocks
from .highpass_filter import highpass_filter
from .line_gram import line_gram
from .line_merge import line_merge
from .nearswap import nearswap
from .pearson import pearson
from .permute import permute
from .permute_merge import permute_merge
from .ram_counts import ram_counts
from .ram_merge import ram_merge
from .random_mask import random_mask
from .rescale import L1Stream
from .sce_energy import sce_energy
from .sce_merge import sce_merge
from .sce_variance import sce_variance
from .threshold import Threshold, Window, topk_thresholds
from .threshold_stream import ThresholdStream
from .topk_mask import topk_mask
from .weighted_sum import weighted_sum
from .zip_match import ZipMatch, zip_match

__all__ = [
    "L1Stream",
    "Threshold",
    "ThresholdStream",
    "Window",
    "ZipMatch",
    "abs_sum",
    "arcee_divergence",
    "arcee_importance",
    "arcee_merge",
    "consensus_merge",
    "expert_gather",
    "expert_scatter",
    "fw_lmo",
    "fw_products",
    "fw_step",
    "gram",
    "gram_blocks",
    "highpass_filter",
    "line_gram",
    "line_merge",
    "nearswap",
    "pearson",
    "permute",
    "permute_merge",
    "ram_counts",
    "ram_merge",
    "random_mask",
    "sce_energy",
    "sce_merge",
    "sce_variance",
    "topk_mask",
    "topk_thresholds",
    "weighted_sum",
    "zip_match",
]

"""The operators: tensor arithmetic that knows nothing of models. One line each; see the modules for the law."""

from .highpass_filter import highpass_filter
from .weighted_sum import weighted_sum

__all__ = ["highpass_filter", "weighted_sum"]

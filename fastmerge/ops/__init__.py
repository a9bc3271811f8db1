"""The operators: tensor arithmetic that knows nothing of models. One line each; see the modules for the law."""

from .weighted_sum import weighted_sum

__all__ = ["weighted_sum"]

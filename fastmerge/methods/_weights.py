"""Weights that a method divides by their sum."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import BadInput
from ._method import Header

SMALLEST = 1e-8  # ops.weighted_sum divides by no smaller sum: what is left of one is rounding


def check_sums(tensors: Sequence[Header], normalize: str) -> None:
    """Raises BadInput for the first tensor whose weights sum to 0 where its parameter `normalize` asks to divide by that."""
    for tensor in tensors:
        weights, total = list(tensor.parameters["weight"]), 0.0
        for w in weights:
            total += w
        if tensor.parameters[normalize] and abs(total) < SMALLEST:
            raise BadInput(
                f"the weights {weights} sum to {total:g}, and {normalize} divides by that",
                where=tensor.name,
                remedy=f"change them, or set {normalize}: false",
            )

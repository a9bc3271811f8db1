"""How alike the models of a merge are: cosines between their deltas, from the Gram matrices of its tensors."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any

Matrix = list[list[float]]


class Cosines:
    """Inner products of the models' deltas (of the models, where the method knows no base), tensor by tensor.

    Filled by the passes of methods that need these numbers anyway (slerp, nuslerp, multislerp, karcher, model_stock), or
    by a pass of its own where a user asked for it.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = list(labels)  # of the recipe's models
        self._grams: dict[str, tuple[tuple[int, ...], bool, Matrix]] = {}
        self._lock = threading.Lock()

    def add(self, tensor: str, models: Sequence[int], gram: Matrix, *, deltas: bool, base_first: bool) -> None:
        """The Gram matrix of a tensor's deltas, or of its models, with the base before them or without it.

        models: which of the recipe's take part.
        """
        if base_first:  # ⟨a − b, c − b⟩ = ⟨a, c⟩ − ⟨a, b⟩ − ⟨b, c⟩ + ⟨b, b⟩
            rest = range(1, len(gram))
            gram = [[gram[i][j] - gram[i][0] - gram[0][j] + gram[0][0] for j in rest] for i in rest]
        with self._lock:
            self._grams[tensor] = (tuple(models), deltas or base_first, gram)

    def report(self, order: Iterable[str]) -> dict[str, Any] | None:
        """Lengths and cosines of the whole models and of each tensor, tensors as in `order`; None without any.

        A cosine with a vector of length zero is 0, as is one of two models that share no tensor.
        """
        seen = [name for name in order if name in self._grams]
        if not seen:
            return None
        count = len(self._labels)
        sums: list[list[list[float]]] = [[[] for _ in range(count)] for _ in range(count)]
        tensors = {}
        for name in seen:
            models, _, gram = self._grams[name]
            for i, a in enumerate(models):
                for j, b in enumerate(models):
                    sums[a][b].append(gram[i][j])
            tensors[name] = {"models": list(models), **_described(gram)}
        of = "deltas" if all(self._grams[name][1] for name in seen) else "models"
        whole = [[math.fsum(s) if all(map(math.isfinite, s)) else math.nan for s in row] for row in sums]
        return {"of": of, "names": self._labels, **_described(whole), "tensors": tensors}


def _described(gram: Matrix) -> dict[str, Any]:
    lengths = [math.sqrt(max(row[i], 0.0)) if math.isfinite(row[i]) else math.nan for i, row in enumerate(gram)]
    matrix = [
        [_cosine(gram[i][j], lengths[i] * lengths[j] if i != j else gram[i][i]) for j in range(len(gram))]
        for i in range(len(gram))
    ]
    return {"lengths": [None if math.isnan(n) else n for n in lengths], "matrix": matrix}


def _cosine(product: float, lengths: float) -> float | None:
    """None where an input has NaN or Inf."""
    if not math.isfinite(product) or not math.isfinite(lengths):
        return None
    return max(-1.0, min(1.0, product / lengths)) if lengths > 0 else 0.0

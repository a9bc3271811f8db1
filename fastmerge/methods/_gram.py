"""Merging on the span of the inputs: one pass for the Gram matrix, mathematics on K numbers, one pass to combine.

Every result of slerp, nuslerp, multislerp, karcher and model_stock is a linear combination of its inputs whose
coefficients depend on their inner products only, so two reads of the inputs suffice whatever the iteration does.
Where an inner product is NaN or Inf (files that hold such values, with ``nan="warn"``) the coefficients are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops.gram_blocks import BLOCK, pairs, total
from ._method import TensorStream


def stream_gram(tensor: TensorStream, *, deltas: bool, base_first: bool = False) -> list[list[float]]:
    """The Gram matrix of a streamed tensor's models, as rows.

    deltas: of model − base instead of the models. base_first: the base is vector 0 and the models follow.
    """
    count = tensor.count + (1 if base_first else 0)
    sums = torch.zeros((-(-tensor.numel // BLOCK), len(pairs(count))), dtype=torch.float64, device="cpu")

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        vectors = [base, *models] if base_first and base is not None else models
        part = ops.gram_blocks(base if deltas else None, vectors)
        sums[offset // BLOCK : offset // BLOCK + len(part)] = part

    tensor.for_each(visit)
    matrix: list[list[float]] = total(sums, count).tolist()
    tensor.keep_gram(matrix, deltas=deltas, base_first=base_first)
    return matrix


def row_sums(x: Tensor) -> Tensor:
    """x.sum(-1) in an order that depends on the length alone: torch splits one long row between its threads."""
    while x.shape[-1] > _SUMMED:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % _SUMMED))
        x = padded.unflatten(-1, (-1, _SUMMED)).sum(-1)
    return x.sum(-1)


_SUMMED = 1024  # elements that torch adds up on one thread


def inner(g: Sequence[Sequence[float]], a: Sequence[float], b: Sequence[float]) -> float:
    """⟨Σ aᵢ xᵢ, Σ bⱼ xⱼ⟩ from the Gram matrix of the xᵢ."""
    return math.fsum(a[i] * b[j] * g[i][j] for i in range(len(a)) for j in range(len(b)))


def norm(g: Sequence[Sequence[float]], a: Sequence[float]) -> float:
    """‖Σ aᵢ xᵢ‖."""
    return math.sqrt(max(0.0, inner(g, a, a)))


def _defined(g: Sequence[Sequence[float]]) -> bool:
    """Whether all inner products are finite: with a NaN or an Inf among the inputs no angle is, nor any coefficient.

    Python's min, max and comparisons would make numbers of a NaN instead.
    """
    return all(math.isfinite(x) for row in g for x in row)


def slerp_coefficients(g: Sequence[Sequence[float]], t: float) -> list[float]:
    """mergekit's slerp between vectors 0 and 1: linear where |cos| > 0.9995; a norm <= 1e-8 counts as 1."""
    if not _defined(g):
        return [math.nan, math.nan]
    lengths = [math.sqrt(g[i][i]) if math.sqrt(g[i][i]) > 1e-8 else 1.0 for i in (0, 1)]
    cos = g[0][1] / (lengths[0] * lengths[1])
    if abs(cos) > 0.9995:
        return [1 - t, t]
    phi = math.acos(max(-1.0, min(1.0, cos)))
    return [math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)]


def nuslerp_coefficients(g: Sequence[Sequence[float]], t: float) -> list[float]:
    """Spherical interpolation without a cut-off: linear only where 1 − cos² <= 1e-16 or a vector vanishes."""
    if not _defined(g):
        return [math.nan, math.nan]
    lengths = math.sqrt(g[0][0]) * math.sqrt(g[1][1])
    cos = max(-1.0, min(1.0, g[0][1] / lengths)) if lengths > 0 else 1.0
    if 1 - cos * cos <= 1e-16:
        return [1 - t, t]
    phi = math.acos(cos)
    return [math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)]


def multislerp_coefficients(g: Sequence[Sequence[float]], weight: Sequence[float], eps: float) -> list[float]:
    """One step on the sphere from the weighted mean direction towards the inputs; lengths are averaged.

    Raises ZeroDivisionError where the mean direction vanishes and there are more than two inputs.
    """
    if not _defined(g):
        return [math.nan] * len(g)
    lengths = [math.sqrt(g[i][i]) + eps for i in range(len(g))]
    mean = [w / n for w, n in zip(weight, lengths, strict=True)]
    size = norm(g, mean)
    if size < eps:
        if len(g) == 2:
            return list(weight)
        raise ZeroDivisionError("the weighted mean direction of the inputs vanishes")
    m = [a / size for a in mean]
    along = [inner(g, _unit(i, lengths), m) for i in range(len(g))]
    drift = math.fsum(w * a for w, a in zip(weight, along, strict=True))
    tangent = [a - drift * b for a, b in zip(mean, m, strict=True)]
    step = norm(g, tangent)
    radial, sideways = math.cos(step), math.sin(step) / step if step > eps else 1.0
    length = math.fsum(w * math.sqrt(g[i][i]) for i, w in enumerate(weight))
    return [length * (radial * a + sideways * b) for a, b in zip(m, tangent, strict=True)]


def _unit(i: int, lengths: Sequence[float]) -> list[float]:
    return [1.0 / lengths[i] if j == i else 0.0 for j in range(len(lengths))]


def karcher_coefficients(g: Sequence[Sequence[float]], max_iter: int, tol: float) -> list[float]:
    """The Karcher mean of the directions of all inputs longer than tol, scaled by their mean length."""
    if not _defined(g):
        return [math.nan] * len(g)
    lengths = [math.sqrt(g[i][i]) for i in range(len(g))]
    taking = [i for i, n in enumerate(lengths) if n > tol]
    if not taking:
        return [0.0] * len(g)
    share = 1.0 / len(taking)
    units = {i: _unit(i, [n or 1.0 for n in lengths]) for i in taking}
    m = [math.fsum(share * units[i][j] for i in taking) for j in range(len(g))]
    size = norm(g, m)
    m = [a / size for a in m] if size >= tol else units[taking[0]]
    for _ in range(max_iter):
        tangent = [0.0] * len(g)
        for i in taking:
            cos = max(-1.0, min(1.0, inner(g, units[i], m)))
            theta = math.acos(cos)
            if theta >= tol:
                scale = share * theta / math.sin(theta) if math.sin(theta) > 0 else 0.0
                tangent = [t + scale * (u - cos * a) for t, u, a in zip(tangent, units[i], m, strict=True)]
        step = norm(g, tangent)
        if step < tol:
            break
        m = [math.cos(step) * a + math.sin(step) * t / step for a, t in zip(m, tangent, strict=True)]
        size = norm(g, m)
        m = [a / size for a in m]
    length = math.fsum(share * lengths[i] for i in taking)
    return [length * a for a in m]


def model_stock_ratio(g: Sequence[Sequence[float]]) -> float:
    """t = K c / (1 + (K − 1) c) with c the mean pairwise cosine of the deltas."""
    if not _defined(g):
        return math.nan
    count = len(g)
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            product = max(math.sqrt(g[i][i]) * math.sqrt(g[j][j]), 1e-6)
            cosines.append(max(-1.0, min(1.0, g[i][j] / product)))
    c = math.fsum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * c
    return 0.0 if abs(divisor) <= 1e-6 else count * c / divisor

"""Matching one unit: linear assignment for plain groups, assignments over assignments where groups nest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .permutation import PermutationSpec
from .units import Signature, Unit

Similarities = Mapping[Signature, Tensor]  # [units, units]: anchor's rows, the other model's columns


@dataclass(frozen=True)
class Match:
    """Permutations of a unit's groups; `value` is the mean similarity of matched pairs over the unit's signatures, and
    `margin` the smallest lead of a matched pair over the rest of its row (negative where the assignment had to yield)."""

    perms: dict[str, Tensor]
    value: float
    margin: float


def _assign(score: np.ndarray) -> tuple[np.ndarray, float]:
    from scipy.optimize import linear_sum_assignment

    # scipy works on a float64 matrix it may use as it is when it minimises: one copy instead of three
    rows, columns = linear_sum_assignment(np.negative(score, dtype=np.float64))
    return columns, float(score[rows, columns].sum(dtype=np.float64))


def _solve(
    groups: list[str],
    parents: Mapping[str, tuple[str, ...]],
    mats: dict[Signature, np.ndarray],
    sizes: Mapping[str, int],
) -> tuple[dict[str, np.ndarray], float]:
    """Permutations of `groups` that (greedily, outermost first) maximise the total of all matrices.

    A matrix of signature (a, b) has axes [a, b, a', b']. Groups that depend on one solved here get a leading axis for it.
    """
    mats = {s: m for s, m in mats.items() if s}
    if not groups:
        return {}, 0.0
    present = {g for s in mats for g in s}
    heads = [g for g in groups if not any(p in groups for p in parents[g])]
    # the group that others depend on or share a matrix with goes first; the smaller one of two that share
    company = {g: any(g in s and len(s) > 1 for s in mats) or any(g in parents[h] for h in groups) for g in heads}
    root = min(heads, key=lambda g: (not company[g], sizes[g], groups.index(g)))
    n = sizes[root]
    if root not in present and not company[root]:
        others, value = _solve([g for g in groups if g != root], parents, mats, sizes)
        return {root: np.arange(n), **others}, value
    alone = mats.get((root,))
    shared = {
        s: np.moveaxis(m, (s.index(root), len(s) + s.index(root)), (0, 1))
        for s, m in mats.items()
        if root in s and len(s) > 1
    }
    linked = {g for s in shared for g in s} - {root}
    linked |= {g for g in groups if root in parents[g]}
    grown = True
    while grown:  # what hangs on the linked groups is settled with them
        more = {g for g in groups if g not in linked and g != root and any(p in linked for p in parents[g])}
        linked |= more
        grown = bool(more)
    inner_groups = [g for g in groups if g in linked]
    worth = np.zeros((n, n)) if alone is None else alone.astype(np.float64)
    inner: list[list[dict[str, np.ndarray]]] = []
    if inner_groups:
        inner_parents = {g: tuple(p for p in parents[g] if p != root) for g in inner_groups}
        for i in range(n):
            inner.append([])
            for j in range(n):
                slices = {tuple(g for g in s if g != root): m[i, j] for s, m in shared.items()}
                found, value = _solve(inner_groups, inner_parents, slices, sizes)
                inner[i].append(found)
                worth[i, j] += value
    columns, total = _assign(worth)
    out: dict[str, np.ndarray] = {root: columns}
    dependent = [g for g in inner_groups if _depends(g, root, parents)]
    for g in dependent:
        out[g] = np.stack([inner[i][columns[i]][g] for i in range(n)])
    rest = [g for g in groups if g != root and g not in dependent]
    if rest:  # not tied to the root's position: one permutation for all of them, given the root's
        summed: dict[Signature, np.ndarray] = {s: m for s, m in mats.items() if root not in s}
        for s, m in shared.items():
            key = tuple(g for g in s if g != root)
            if all(g in rest for g in key):
                part = sum(m[i, columns[i]] for i in range(n))
                summed[key] = summed[key] + part if key in summed else part
        found, value = _solve(rest, parents, {s: m for s, m in summed.items() if all(g in rest for g in s)}, sizes)
        out.update(found)
        total += value
    return out, total


def _depends(group: str, root: str, parents: Mapping[str, tuple[str, ...]]) -> bool:
    return any(p == root or (p in parents and _depends(p, root, parents)) for p in parents[group])


def solve(spec: PermutationSpec, unit: Unit, similarities: Similarities) -> Match:
    """The permutations of one unit that match the other model's units to the anchor's.

    A plain group is one linear assignment (scipy). Where groups nest (heads and the dims in them, the channels of a
    GroupNorm group), the outer units are assigned by the best inner totals: g² inner assignments, one outer; all the
    signatures that share the outer group (q and k, v, relative position biases) vote for ONE outer order.

    Cost: O(n³) a plain group of n; g²·O((n/g)³) nested.
    """
    signatures = [s for s in unit.signatures if s in similarities]
    sizes = {g: spec.size(g) for g in unit.groups}
    if len(unit.groups) == 1 and len(signatures) == 1:
        scores = similarities[signatures[0]].detach().cpu().numpy()
        columns, _ = _assign(scores)
        perms = {unit.groups[0]: torch.from_numpy(columns.astype(np.int64))}
    else:
        mats: dict[Signature, np.ndarray] = {}
        for s in signatures:
            shape = [sizes[g] for g in s]
            mats[s] = similarities[s].detach().cpu().numpy().reshape(*shape, *shape) / similarities[s].shape[0]
        parents = {g: spec.parents(g) for g in unit.groups}
        found, _ = _solve(list(unit.groups), parents, mats, sizes)
        perms = {g: _full(spec, g, found, unit) for g in unit.groups}
    value, margin = evaluate(spec, similarities, signatures, perms)
    return Match(perms, value, margin)


def _full(spec: PermutationSpec, group: str, found: Mapping[str, np.ndarray], unit: Unit) -> Tensor:
    index = torch.from_numpy(np.ascontiguousarray(found[group]).astype(np.int64))
    return index.expand(spec.shape(group)).contiguous()


def matched_columns(spec: PermutationSpec, signature: Signature, perms: Mapping[str, Tensor]) -> Tensor:
    """For each row of a signature's matrix, the column it is matched with."""
    from .layout import Layout, source_index

    return source_index(Layout((signature,)), perms, spec.size, spec.parents, {}, 1)[0]


def evaluate(
    spec: PermutationSpec,
    similarities: Similarities,
    signatures: list[Signature],
    perms: Mapping[str, Tensor],
    *,
    margins: bool = True,
) -> tuple[float, float]:
    """(mean matched similarity, averaged over signatures; smallest lead of a match over the rest of its row)."""
    values, margin = [], float("inf")
    for s in signatures:
        matrix = similarities[s]
        columns = matched_columns(spec, s, perms).to(matrix.device)[:, None]
        matched = matrix.gather(1, columns)
        values.append(float(matched.double().mean()))
        if margins and matrix.shape[1] > 1:
            for rows, column, own in zip(matrix.split(256), columns.split(256), matched.split(256), strict=True):
                rest = rows.scatter(1, column, -torch.inf).amax(1)
                margin = min(margin, float((own[:, 0] - rest).min()))
    return (sum(values) / len(values) if values else 0.0), margin

"""zip_match: ZipIt's greedy matching of the features of two models, within and across them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._assignment import assign_groups
from ._checks import compute_dtype, require_float


class ZipMatch(NamedTuple):
    """`label[i]` is the merged feature that feature i goes to; `score` holds the similarity of each merge, in order.

    `merge` [2n, m] averages the members of each merged feature (its columns sum to 1), `unmerge` [2n, m] is 1 where
    ``label[i] == j``. Both have no columns when ``dense=False``: the labels say all.
    """

    merge: Tensor
    unmerge: Tensor
    label: Tensor
    score: Tensor


def _check(similarity: Tensor, ratio: float, alpha: float, budget: float, groups: int | None) -> tuple[int, int, int]:
    """(features per model, merges, groups), all per call; raises for what can not be matched."""
    require_float("zip_match", similarity=similarity)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or similarity.shape[0] % 2:
        raise ValueError(f"zip_match: similarity must be [2n, 2n], not {tuple(similarity.shape)}")
    n, g = similarity.shape[0] // 2, 1 if groups is None else groups
    if not 0.0 <= ratio <= 0.5:
        raise ValueError(f"zip_match: ratio must be in [0, 0.5], not {ratio}")
    if alpha < 0 or budget < 0:
        raise ValueError(f"zip_match: alpha and budget must not be negative (alpha={alpha}, budget={budget})")
    if g < 1 or n % g:
        raise ValueError(f"zip_match: {n} features can not be split into {groups} groups of equal size")
    if bool(similarity.isnan().any()):
        raise ValueError("zip_match: similarity holds NaN")
    size = n // g
    return n, 2 * size - int(2 * size * (1 - ratio) + 1e-4), g


def _greedy(s: Tensor, merges: int, alpha: float, budget: int) -> tuple[Tensor, Tensor]:
    """The published loop on one [2n, 2n] matrix: (label, score). O(n³), and the law."""
    size = s.shape[0]
    n = size // 2
    s = s.triu(1)
    s = s + s.T
    s.fill_diagonal_(-torch.inf)
    root = torch.arange(size, device="cpu")  # the surviving feature that each one is part of
    alive = list(range(size))
    model = [i // n for i in range(size)] if n else []
    seen = [1 << m for m in model]  # models a feature holds parts of
    left = [budget, budget]
    score = []
    for _ in range(merges):
        flat = int(s.argmax())
        row, column = sorted((flat // len(alive), flat % len(alive)))
        score.append(s[row, column].clone())
        root[root == alive[column]] = alive[row]
        seen[row] |= seen[column]
        joined = torch.minimum(s[row], s[column])
        if alpha > 0:
            joined = joined * torch.tensor(alpha, dtype=s.dtype, device="cpu")
        else:  # a matched feature may not be matched again with a model that is in it
            joined[[i for i, m in enumerate(seen) if m & seen[row]]] = -torch.inf
        joined[row] = -torch.inf
        s[row, :] = joined
        s[:, row] = joined
        keep = [i for i in range(len(alive)) if i != column]
        s = s[keep][:, keep]
        within = model[row] if model[row] == model[column] else None
        alive, model, seen = ([v[i] for i in keep] for v in (alive, model, seen))
        if within is not None:
            left[within] -= 1
            if left[within] <= 0:
                mine = torch.tensor([m == within for m in model], device="cpu")
                s[mine[:, None] & mine[None, :]] = -torch.inf
    label = torch.searchsorted(torch.tensor(alive, dtype=torch.int64, device="cpu"), root)
    return label, torch.stack(score) if score else s.new_zeros(0)


def _native_greedy(s: Tensor, merges: int, alpha: float, budget: int) -> tuple[Tensor, Tensor]:
    s = s.contiguous()
    label = torch.empty(s.shape[0], dtype=torch.int64, device="cpu")
    score = torch.empty(merges, dtype=s.dtype, device="cpu")
    _native.lib().zip_match(
        label.data_ptr(), score.data_ptr(), s.data_ptr(), _native.DTYPES[s.dtype], s.shape[0], merges, alpha, budget,
        _native.threads(),
    )  # fmt: skip
    return label, score


def _match(similarity, ratio, alpha, budget, groups, dense, greedy) -> ZipMatch:  # type: ignore[no-untyped-def]
    n, merges, g = _check(similarity, ratio, alpha, budget, groups)
    s = similarity.detach().to("cpu", compute_dtype(similarity))
    limit = int(merges / 2 * budget + 1e-4)
    if g == 1:
        label, score = greedy(s, merges, alpha, limit)
    else:
        size = n // g
        kept = 2 * size - merges
        pairs, _ = assign_groups(s[:n, n:], g)
        label, scores = torch.empty(2 * n, dtype=torch.int64, device="cpu"), []
        for i in range(g):
            a, b = i * size, n + int(pairs[i]) * size
            members = torch.from_numpy(np.r_[a : a + size, b : b + size])
            found, score = greedy(s[members][:, members], merges, alpha, limit)
            label[members] = found + i * kept
            scores.append(score)
        score = torch.cat(scores)
    columns = int(label.max()) + 1 if n else 0
    unmerge = s.new_zeros(2 * n, columns if dense else 0)
    if dense:
        unmerge[torch.arange(2 * n, device="cpu"), label] = 1
    merge = unmerge / unmerge.sum(0, keepdim=True)
    device = similarity.device
    return ZipMatch(merge.to(device), unmerge.to(device), label.to(device), score.to(device))


@op(numerics="A", kind="assignment")
def zip_match(
    similarity: Tensor,
    *,
    ratio: float = 0.5,
    alpha: float = 0.5,
    budget: float = 1.0,
    groups: int | None = None,
    dense: bool = True,
) -> ZipMatch:
    """ZipIt's greedy matching: repeatedly merges the two most similar features of two models' 2n.

    The pair of the largest similarity (the first in row-major order on ties) is merged into its lower feature r, whose
    similarity to every other feature becomes ``alpha · min(S[r, ·], S[c, ·])``: complete linkage, damped so that merging
    again is rarer. Merging two features of one model spends that model's budget, int(merges / 2 · budget); at 0 all
    pairs within it are ruled out. ``alpha = 0``: a merged feature never meets a model again that is already in it.

    Args:
        similarity: [2n, 2n], the first n features are model 0's; symmetric (the upper triangle is read), no NaN.
        ratio: fraction of the 2n features that is merged away; 0.5 leaves n.
        groups: match g groups of n / g features (heads): groups are paired by the best matchings inside them
            (assignments over assignments, first model's order kept), then each pair is zipped on its own.
        dense: whether to build the two matrices (labels are enough to apply a match).

    Returns: :class:`ZipMatch` with m = 2n − merges merged features, ordered by their first member.
    Numerics: class A: comparisons and single products, the same merges in the same order on every backend. (With groups
        the pairing is scipy's, on float64 sums.)
    Cost: O(n² log n) time, 4.3·(2n)² bytes. The reference is the O(n³) loop.
    Raises: TypeError, ValueError for a matrix that is not square with an even size, NaN, or parameters out of range.
    Source: ZipIt (arXiv:2305.03053), alg. 1; MuDSC (arXiv:2403.01753), sec. 3.3.
    """
    return _match(similarity, ratio, alpha, budget, groups, dense, _greedy)


@zip_match.backend("cpu", when=lambda similarity, **_: _native.cpu_why_not(similarity))
def _zip_match_cpu(
    similarity: Tensor,
    *,
    ratio: float = 0.5,
    alpha: float = 0.5,
    budget: float = 1.0,
    groups: int | None = None,
    dense: bool = True,
) -> ZipMatch:
    return _match(similarity, ratio, alpha, budget, groups, dense, _native_greedy)


def _features(g: torch.Generator, n: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(2 * n, 3 * n + 2, generator=g)
    x[n:] += x[:n]
    s = torch.corrcoef(x)
    return (s.triu(1) + s.triu(1).T + torch.eye(2 * n)).to(dtype)


@zip_match.case("correlated features")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (_features(g, 37, dtype),), {}


@zip_match.case("ties, small budget")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    s = torch.randint(-2, 3, (40, 40), generator=g).to(dtype)
    return (torch.minimum(s, s.T),), {"alpha": 0.75, "budget": 0.3}


@zip_match.case("no second match, ratio below a half")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (_features(g, 24, dtype),), {"alpha": 0.0, "ratio": 0.3}


@zip_match.case("groups")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (_features(g, 24, dtype),), {"groups": 4}


@zip_match.case("one feature each; nothing to do")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (_features(g, 1, dtype),), {"ratio": 0.0}

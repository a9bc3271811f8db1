"""Linear assignment, by scipy, plain and nested (a matching of groups by the best matchings inside them)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def assign(score: Tensor) -> Tensor:
    """Column matched to each row, [n] int64, maximising the sum of score[i, column[i]]; score is [n, n], finite."""
    from scipy.optimize import linear_sum_assignment  # half a second that other merges need not pay

    _, columns = linear_sum_assignment(score.detach().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns.astype(np.int64))


def assign_groups(score: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Matches g groups of s units: the outer matching [g], and the inner ones [g, s] of the matched groups.

    score is [g·s, g·s]; the worth of pairing two groups is the best total over matchings of their units. g² assignments
    of size s and one of size g.
    """
    from scipy.optimize import linear_sum_assignment

    n = score.shape[0]
    s = n // groups
    blocks = score.detach().cpu().reshape(groups, s, groups, s).permute(0, 2, 1, 3).contiguous().numpy()
    inner = np.empty((groups, groups, s), dtype=np.int64)
    worth = np.empty((groups, groups))
    for i in range(groups):
        for j in range(groups):
            rows, columns = linear_sum_assignment(blocks[i, j], maximize=True)
            inner[i, j] = columns
            worth[i, j] = blocks[i, j][rows, columns].sum(dtype=np.float64)
    _, outer = linear_sum_assignment(worth, maximize=True)
    return torch.from_numpy(outer.astype(np.int64)), torch.from_numpy(inner[np.arange(groups), outer])

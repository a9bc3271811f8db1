"""Weight-space similarity of a unit: products of feature matrices under the current permutations, kept up to date."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops.pearson import EPS, normalise
from .layout import Perms
from .permutation import PermutationSpec
from .units import Signature, Unit, View

KINDS = ("pearson", "cosine", "dot")


def is_feature(name: str) -> bool:
    """Batch-norm statistics describe data, not weights: they move with their channels but are not compared (published)."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


class WeightFeatures:
    """Similarities of one unit between an anchor and another model.

    Row means and norms do not depend on the order of columns, so they are computed once. The products are updated by
    the columns that moved when few did, recomputed when many did, and kept when none did.
    """

    def __init__(
        self, spec: PermutationSpec, unit: Unit, anchor: Mapping[str, Tensor], other: Mapping[str, Tensor], kind: str
    ) -> None:
        self.spec, self.unit, self.anchor, self.other, self.kind = spec, unit, anchor, other, kind
        self.views: dict[Signature, list[View]] = {}
        for v in unit.views:
            if is_feature(v.tensor):
                self.views.setdefault(v.signature, []).append(v)
        self._moments: dict[Signature, tuple[Tensor, Tensor, Tensor, Tensor, int]] = {}
        self._products: dict[Signature, Tensor] = {}
        self._state: dict[str, Tensor] = {}

    def neighbours(self) -> set[str]:
        """Groups, of other units and of this one, that permute the columns of this unit's features."""
        out: set[str] = set()
        for views in self.views.values():
            for v in views:
                for a in self.spec.tensors[v.tensor]:
                    if a.axis != v.axis.axis:
                        out |= set(a.layout.groups())
        return out

    def aligned(self, done: set[str]) -> set[str]:
        """Tensors whose other axes are fixed or settled already."""
        out = set()
        for views in self.views.values():
            for v in views:
                others = [a for a in self.spec.tensors[v.tensor] if a.axis != v.axis.axis]
                if all(g in done for a in others for g in a.layout.groups()):
                    out.add(v.tensor)
        return out

    def _pair(self, v: View, perms: Perms) -> tuple[Tensor, Tensor]:
        a = self.anchor[v.tensor]
        b = self.spec.permute(v.tensor, self.other[v.tensor], perms, skip=v.axis.axis, gather=_gather)
        return v.rows(a).to(torch.float32), v.rows(b).to(torch.float32)

    def similarity(self, perms: Perms, only: set[str] | None = None) -> dict[Signature, Tensor]:
        """{signature: [units, units]}; with `only`, from those tensors alone (nothing is kept then)."""
        if only is not None:
            out = {}
            for s, views in self.views.items():
                chosen = [v for v in views if v.tensor in only]
                if chosen:
                    pairs = [self._pair(v, perms) for v in chosen]
                    product = sum_products(pairs)
                    out[s] = self._finish(product, self._moments_of(pairs))
            return out
        now = {g: perms[g] for g in self.neighbours() if g in perms}
        fresh = bool(self._products) and set(now) == set(self._state)
        if not (fresh and all(now[g] is self._state[g] or torch.equal(now[g], self._state[g]) for g in now)):
            for s, views in self.views.items():
                self._update(s, views, now, fresh)
            self._state = now
        return {s: self._finish(self._products[s].clone(), self._moments[s]) for s in self.views}

    def _update(self, s: Signature, views: list[View], now: dict[str, Tensor], fresh: bool) -> None:
        if s not in self._moments:
            self._moments[s] = self._moments_of(
                (v.rows(self.anchor[v.tensor]).float(), v.rows(self.other[v.tensor]).float()) for v in views
            )
        if not fresh:
            self._products[s] = sum_products(self._pair(v, now) for v in views)
            return
        product = self._products[s]
        for v in views:
            narrow = self._moved_columns(v, now)
            if narrow is None:
                a, b = self._pair(v, now)
                _, before = self._pair(v, self._state)
                product.addmm_(a, b.sub_(before).T if b.data_ptr() != before.data_ptr() else (b - before).T)
            elif narrow[1].numel():
                axis, moved, new, old = narrow
                tensor = self.other[v.tensor]
                a = v.rows(self.anchor[v.tensor].index_select(axis, moved)).float()
                b = v.rows(tensor.index_select(axis, new).float() - tensor.index_select(axis, old).float())
                product.addmm_(a, b.T)

    def _moved_columns(self, v: View, now: dict[str, Tensor]) -> tuple[int, Tensor, Tensor, Tensor] | None:
        """(axis, positions that changed, what they hold now, what they held) of a matrix with one other permuted axis;
        None when that is not the case, or most of the axis moved."""
        others = [a for a in self.spec.tensors[v.tensor] if a.axis != v.axis.axis]
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        if not others:
            return 0, none, none, none
        if len(others) != 1 or self.anchor[v.tensor].ndim != 2 or self.spec.crossing(v.tensor):
            return None
        new, old = self.spec.index(others[0], now), self.spec.index(others[0], self._state)
        if new is None or old is None:
            return (0, none, none, none) if new is old else None
        moved = torch.nonzero(new != old).flatten()
        if moved.numel() * 2 > new.numel():
            return None
        return others[0].axis, moved, new[moved], old[moved]

    @staticmethod
    def _moments_of(pairs) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:  # type: ignore[no-untyped-def]
        """Row sums and sums of squares of both sides, in float64, and the number of features."""
        total: list[Tensor] | None = None
        count = 0
        for a, b in pairs:
            part = [f(x) for x in (a, b) for f in (_row_sum, _row_square)]
            total = part if total is None else [t + p for t, p in zip(total, part, strict=True)]
            count += a.shape[1]
        assert total is not None
        return total[0], total[1], total[2], total[3], count

    def _finish(self, product: Tensor, moments: tuple[Tensor, Tensor, Tensor, Tensor, int]) -> Tensor:
        sum_a, square_a, sum_b, square_b, count = moments
        if self.kind == "dot":
            return product
        ma, mb = sum_a / count, sum_b / count
        if self.kind == "cosine":
            ma, mb = torch.zeros_like(ma), torch.zeros_like(mb)
        covariance = product.div_(count).addr_(ma.float(), mb.float(), alpha=-1.0)
        sa = (square_a / count - ma.square()).clamp(min=0).sqrt().float()
        sb = (square_b / count - mb.square()).clamp(min=0).sqrt().float()
        return normalise(covariance, sa, sb, EPS).nan_to_num_(0.0, 0.0, 0.0)


def _gather(tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    for axis, index in indices.items():
        tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor


def _row_sum(x: Tensor) -> Tensor:
    return x.sum(1, dtype=torch.float64)


def _row_square(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norms.double().square()


def sum_products(pairs) -> Tensor:  # type: ignore[no-untyped-def]
    """Σ a·bᵀ over pairs of feature matrices, in order."""
    out: Tensor | None = None
    for a, b in pairs:
        out = a @ b.T if out is None else out.addmm_(a, b.T)
    assert out is not None
    return out

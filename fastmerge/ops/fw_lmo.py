"""fw_lmo: the linear minimisation oracle of Frank-Wolfe merging, one pass over gradients and candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _cuda, _native
from .._dispatch import op
from . import _fw_cuda
from ._checks import require_float, require_like
from .fw_products import FwProducts, fw_products, native

METRICS = ("dot", "cosine")
GRANULARITIES = ("layer", "model")


class FwChoice(NamedTuple):
    """What a Frank-Wolfe step moves towards."""

    choice: Tensor  # [L] or [1], int64: the candidate per tensor or for the model; -1 the zero vertex; -2 only NaN
    score: Tensor  # [K, L] or [K, 1], float64
    sqnorms: Tensor  # [K, L], float64: |s_k|² per tensor, to be passed to the next call


def prepare(
    gradients: Sequence[Tensor],
    candidates: Sequence[Sequence[Tensor]],
    metric: str,
    granularity: str,
    sqnorms: Tensor | None,
) -> None:
    if metric not in METRICS or granularity not in GRANULARITIES:
        raise ValueError(
            f"fw_lmo: metric {metric!r} is not one of {METRICS}, or granularity {granularity!r} of {GRANULARITIES}"
        )
    if not gradients or not candidates:
        raise ValueError("fw_lmo: gradients or candidates is empty")
    for k, tensors in enumerate(candidates):
        if len(tensors) != len(gradients):
            raise ValueError(f"fw_lmo: candidates[{k}] has {len(tensors)} tensors for {len(gradients)} gradients")
    for n, g in enumerate(gradients):
        require_float("fw_lmo", **{f"gradients[{n}]": g})
        # Candidates may stay on the host and stream past a gradient on a GPU: only their shapes must match then.
        pool = [c[n] for c in candidates]
        on_host = g.device.type != "cpu" and all(t.device.type == "cpu" for t in pool)
        require_like(
            "fw_lmo",
            g.to("meta") if on_host else g,
            [t.to("meta") for t in pool] if on_host else pool,
            f"tensor {n} of candidates",
        )
    if sqnorms is not None and sqnorms.shape != (len(candidates), len(gradients)):
        raise ValueError(f"fw_lmo: sqnorms has shape {tuple(sqnorms.shape)}, expected [K, L]")


def choose(
    products: Sequence[FwProducts], *, metric: str = "dot", granularity: str = "layer", zero_if_ascent: bool = False
) -> FwChoice:
    """The candidates that minimise the score, from the products of each tensor (see :func:`fw_lmo`).

    Frank-Wolfe over streamed or sharded gradients feeds tensors to :func:`fw_products` and ends here.
    """
    dots = torch.stack([p.dots for p in products], dim=1)
    sqnorms = torch.stack([p.sqnorms for p in products], dim=1)
    score = dots
    if metric == "cosine":
        lengths = sqnorms.sqrt() * torch.stack([p.grad_sqnorm for p in products]).sqrt()
        score = torch.where(lengths == 0, 0.0, dots / lengths)
    if granularity == "model":
        model = torch.zeros_like(score[:, :1])
        for layer in range(score.shape[1]):  # in index order: the same bits whatever the library's reduction does
            model = model + score[:, layer : layer + 1]
        score = model
    return FwChoice(lowest(score, zero_if_ascent=zero_if_ascent), score, sqnorms)


def lowest(score: Tensor, *, zero_if_ascent: bool = False) -> Tensor:
    """[L] the first candidate with the lowest of [K, L] scores, -1 and -2 as :func:`fw_lmo` says."""
    ranked = torch.where(score.isnan(), float("inf"), score)
    best = ranked.min(dim=0).values
    # The first of equal scores: argmin does not promise which.
    choice = (ranked == best).int().argmax(dim=0)
    if zero_if_ascent:
        choice = torch.where(best >= 0, -1, choice)
    return torch.where(score.isnan().all(dim=0), -2, choice)


@op(numerics="B", kind="reduction32")
def fw_lmo(
    gradients: Sequence[Tensor],
    candidates: Sequence[Sequence[Tensor]],
    *,
    metric: str = "dot",
    granularity: str = "layer",
    zero_if_ascent: bool = False,
    sqnorms: Tensor | None = None,
) -> FwChoice:
    """The candidate each tensor (or the whole model) should move towards: the one with the smallest product with g.

    ``score[k, l] = ⟨g_l, s_kl⟩`` (dot) or ``⟨g_l, s_kl⟩ / (‖g_l‖·‖s_kl‖)`` (cosine; 0 where a norm is 0), and
    ``choice[l] = argmin_k score[k, l]``. With granularity ``model`` the scores are summed over l first (dot: the product
    of the whole vectors; cosine: the sum of per-tensor cosines). Equal scores go to the first candidate; a NaN never
    wins, and a column of NaN gives −2. With `zero_if_ascent` a best score >= 0 gives −1, the zero vertex.

    Args:
        gradients: L >= 1 tensors.
        candidates: K >= 1 lists of L tensors of their shapes; dtypes may differ. With gradients on a GPU, candidates
            on the host stream through two buffers, in any number.
        sqnorms: [K, L] of an earlier call with these candidates: saves computing them.

    Numerics: class B, as :func:`fw_products`; choices agree across backends wherever the margin exceeds the error.
    Cost: one read of gradients and candidates; (4K + 2)·N flops, (2K + 2)·N with sqnorms.
    Raises: TypeError, ValueError for empty lists, unknown options, lengths, dtypes, shapes or devices that differ.
    Source: FW-Merging (arXiv:2503.12649), eq. 4 and alg. 1; cosine and the zero vertex: the authors' code.
    """
    prepare(gradients, candidates, metric, granularity, sqnorms)
    products = []
    for n, g in enumerate(gradients):
        p = fw_products.reference(g, [c[n].to(g.device) for c in candidates], norms=sqnorms is None)
        products.append(p if sqnorms is None else p._replace(sqnorms=sqnorms[:, n].to(p.dots)))
    return choose(products, metric=metric, granularity=granularity, zero_if_ascent=zero_if_ascent)


@fw_lmo.backend(
    "cpu",
    when=lambda gradients, candidates, **_: _native.cpu_why_not(*gradients, *(t for c in candidates for t in c)),
)
def _fw_lmo_cpu(
    gradients: Sequence[Tensor],
    candidates: Sequence[Sequence[Tensor]],
    *,
    metric: str = "dot",
    granularity: str = "layer",
    zero_if_ascent: bool = False,
    sqnorms: Tensor | None = None,
) -> FwChoice:
    prepare(gradients, candidates, metric, granularity, sqnorms)
    k = len(candidates)
    totals = torch.zeros(len(gradients), 2 * k + 1, dtype=torch.float64, device="cpu")
    native(gradients, candidates, sqnorms is None, totals)
    if sqnorms is not None:
        totals[:, k : 2 * k] = sqnorms.T
    products = [FwProducts(row[:k], row[k : 2 * k], row[2 * k]) for row in totals]
    return choose(products, metric=metric, granularity=granularity, zero_if_ascent=zero_if_ascent)


def _cuda_why_not(gradients, candidates, **_):  # type: ignore[no-untyped-def]
    pool = [t for c in candidates for t in c]
    if gradients and pool and gradients[0].device.type == "cuda" and all(t.device.type == "cpu" for t in pool):
        # Candidates on the host stream past the gradients: only their dtypes matter.
        strange = next((t.dtype for t in pool if t.dtype not in _cuda.NAMES), None)
        return _cuda.why_not(*gradients) or (strange and f"a candidate has dtype {strange}")
    return _cuda.why_not(*gradients, *pool)


@fw_lmo.backend("cuda", when=_cuda_why_not)
def _fw_lmo_cuda(
    gradients: Sequence[Tensor],
    candidates: Sequence[Sequence[Tensor]],
    *,
    metric: str = "dot",
    granularity: str = "layer",
    zero_if_ascent: bool = False,
    sqnorms: Tensor | None = None,
) -> FwChoice:
    prepare(gradients, candidates, metric, granularity, sqnorms)
    k, device = len(candidates), gradients[0].device
    totals = torch.zeros(len(gradients), 2 * k + 1, dtype=torch.float64, device=device)
    streamed = candidates[0][0].device != device
    (_fw_cuda.streamed_products if streamed else _fw_cuda.products)(gradients, candidates, sqnorms is None, totals)
    if sqnorms is not None:
        totals[:, k : 2 * k] = sqnorms.T.to(totals)
    products = [FwProducts(row[:k], row[k : 2 * k], row[2 * k]) for row in totals]
    return choose(products, metric=metric, granularity=granularity, zero_if_ascent=zero_if_ascent)


def _inputs(g: torch.Generator, dtype: torch.dtype, count: int, **kwargs: object):  # type: ignore[no-untyped-def]
    shapes = [(64, 33), (33,), (), (40, 57), (0, 5)]
    gradients = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    return (gradients, [[torch.randn(s, generator=g).to(dtype) for s in shapes] for _ in range(count)]), kwargs


@fw_lmo.case("dot per layer")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _inputs(g, dtype, 3)


@fw_lmo.case("cosine per layer, zero vertex")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _inputs(g, dtype, 3, metric="cosine", zero_if_ascent=True)


@fw_lmo.case("dot for the model")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _inputs(g, dtype, 5, granularity="model")


@fw_lmo.case("cosine for the model, known norms")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    args, kwargs = _inputs(g, dtype, 2, granularity="model", metric="cosine")
    norms = torch.tensor([[float(t.double().square().sum()) for t in c] for c in args[1]], dtype=torch.float64)
    return args, {**kwargs, "sqnorms": norms}


@fw_lmo.case("zero and NaN candidates, equal scores")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    gradient = torch.randn(70, generator=g).to(dtype)
    zero, nan = torch.zeros(70).to(dtype), torch.full((70,), float("nan")).to(dtype)
    return ([gradient, nan, zero], [[nan, zero, zero], [gradient, zero, nan], [gradient, zero, zero]]), {
        "metric": "cosine"
    }

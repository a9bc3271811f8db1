"""Experts collected tensor by tensor from streams, in memory that holds their entries and chunks of the inputs."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import BadInput
from ..methods import TensorStream
from ..methods._fr_rules import Rule, resolve
from ..methods._gram import row_sums
from ..methods._thresholds import tensor_thresholds
from ..methods.fr import coefficients, lambdas_of
from ..ops.abs_sum import BLOCK
from ..ops.threshold import kept_count, window_counts
from ..ops.topk_mask import rule_mask
from .storage import Expert, Sparse

_Piece = tuple[int, Tensor, Tensor]  # offset, positions, values


@dataclass
class _Sums:
    """Of one model: sums of |v| and v² over all elements and over the kept ones, and how many of each."""

    whole: float = 0.0
    kept: float = 0.0
    whole_squares: float = 0.0
    kept_squares: float = 0.0
    count: int = 0
    kept_count: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    @property
    def mean(self) -> float:
        return self.whole / self.count if self.count else 0.0


@dataclass
class _Found:
    """One tensor of all models."""

    rule: Rule
    parameters: Mapping[str, Any]
    lambdas: list[float]
    entries: list[Sparse]
    sums: list[_Sums]
    filtered: list[float] = field(default_factory=list)  # Σ|filtered delta|, where μ asks for it


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raises BadInput for expert parameters that no tensor can have."""
    resolve(parameters)
    for density, gamma in zip(parameters["density"], parameters["gamma"], strict=True):
        if not 0 < density <= 1:
            raise BadInput(f"density must be in (0, 1], not {density:g}", remedy="it is the share that an expert keeps")
        epsilon = parameters["epsilon"]
        if parameters["trim"] == "rank_random" and density < 1 and not epsilon < density < 1 - epsilon:
            raise BadInput(
                f"density {density:g} ± epsilon {epsilon:g} must lie inside (0, 1)", remedy="choose a smaller epsilon"
            )
        if parameters["trim"] == "window" and density + gamma > 1:
            raise BadInput(
                f"density {density:g} + gamma {gamma:g} is more than everything",
                remedy="choose a smaller gamma or density",
            )
    try:
        re.compile(parameters["experts"])
    except re.error as error:
        raise BadInput(
            f"experts {parameters['experts']!r} is not a regular expression: {error}",
            remedy="escape what is to be taken literally: a point is \\. and a bracket \\[",
        ) from None


def task_names(given: Sequence[str] | None, labels: Sequence[str | None]) -> list[str]:
    """The names of the experts: those given, else the last part of every model's path, else task1 …"""
    names = (
        [Path(m).name if m is not None else f"task{i + 1}" for i, m in enumerate(labels)] if given is None else given
    )
    if len(names) != len(labels) or len(set(names)) != len(names):
        raise BadInput(
            f"{len(labels)} models need as many different task names, not {list(names)}", remedy="give tasks: [...]"
        )
    bad = [t for t in names if not re.fullmatch(r"[\w.+-]+", t)]
    if bad:
        raise BadInput(f"task name {bad[0]!r} can not be a file name", remedy="use letters, digits and . _ + -")
    return list(names)


class Collection:
    """The experts of all models: ``add`` every tensor, then ask for ``experts``. See :func:`.extract.extract`."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self._found: dict[str, _Found] = {}

    def add(self, stream: TensorStream) -> None:
        """Take the entries and sums of one tensor; `stream.parameters` are those of method ``free``."""
        p = stream.parameters
        if not stream.numel or re.search(p["experts"], stream.name) is None:
            return
        if stream.count != len(self.tasks):
            raise BadInput(
                f"tensor {stream.name!r} merges {stream.count} models, not {len(self.tasks)}",
                remedy="experts need every model everywhere",
            )
        rule = resolve(p)
        rows = _by_rows(stream.shape, p)
        choose = _chooser(stream, rows)
        pieces: list[list[_Piece]] = [[] for _ in self.tasks]
        blocks = torch.zeros(2, stream.count, -(-stream.numel // BLOCK), dtype=torch.float64, device="cpu")
        lock = threading.Lock()

        def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
            at = slice(offset // BLOCK, -(-(offset + models[0].numel()) // BLOCK))
            blocks[0, :, at] = ops.abs_sum(base, models)
            for i, model in enumerate(models):
                if p["mu"] == "balanced":
                    blocks[1, i, at] = ops.gram_blocks(base, [model])[:, 0]
                index, value = choose(base, model, i, offset)
                with lock:
                    pieces[i].append((offset, index.cpu(), value.cpu()))

        stream.for_each(visit, align=stream.shape[-1] if rows else 1)
        filtered = [_filtered_sum(stream, rule, i) for i in range(stream.count)] if p["mu"] == "vit" else []
        entries = [_joined(piece, stream) for piece in pieces]
        sums = [_sums(blocks[0, i], blocks[1, i], s, stream.numel) for i, s in enumerate(entries)]
        lambdas = lambdas_of(p["lambda"], rule, stream.count)
        self._found[stream.name] = _Found(rule, p, lambdas, entries, sums, filtered)

    def experts(self) -> list[Expert]:
        """One expert per task, every tensor with its μ."""
        count = len(self.tasks)
        measured = [f for n, f in self._found.items() if f.rule.filters(n, f.entries[0].shape)]
        # Without a filtered tensor there is nothing fr would measure: everything counts then.
        totals = [sum((f.sums[i] for f in measured or self._found.values()), _Sums()) for i in range(count)]
        made: list[dict[str, Sparse]] = [{} for _ in self.tasks]
        for name, f in self._found.items():
            sums = f.sums if f.rule.scope == "tensor" else totals
            shares = coefficients(f.rule, f.lambdas, [s.mean for s in sums], count)
            for i, s in enumerate(f.entries):
                mu = self._mu(f, i, sums[i], shares[i]) if s.index.numel() else 0.0
                made[i][name] = Sparse(s.shape, s.index, s.value, mu)
        options = next((f.parameters for f in self._found.values()), {})
        about = {k: str(options[k]) for k in ("mu", "trim", "by", "combine") if k in options}
        densities = options.get("density", [0.0] * count)
        return [Expert(t, made[i], float(densities[i]), dict(about)) for i, t in enumerate(self.tasks)]

    def _mu(self, found: _Found, i: int, sums: _Sums, share: float) -> float:
        policy, density = found.parameters["mu"], found.parameters["density"][i]
        if policy == "constant":
            return float(found.parameters["constant"])
        if policy == "vit":
            # Means over tensors of every tensor's mean, whatever its size: as published.
            e = math.fsum(f.sums[i].kept / f.sums[i].count for f in self._found.values())
            t = math.fsum(f.filtered[i] / f.sums[i].count for f in self._found.values())
            return -(e / density) * math.log10(density) / t if t > 0 else 0.0
        if sums.kept <= 0:
            return 0.0
        if policy == "balanced":
            squares = sums.whole_squares / sums.kept_squares if sums.kept_squares > 0 else 1.0
            return math.sqrt(sums.whole / sums.kept * math.sqrt(squares))
        scaled = share * sums.mean
        return -(sums.kept / sums.kept_count) * math.log(density) / scaled if scaled > 0 else 0.0


def _by_rows(shape: Sequence[int], p: Mapping[str, Any]) -> bool:
    """Whether entries are chosen row by row: a row must be long enough for one of its own."""
    if p["trim"] == "random" or len(shape) < 2:
        return False
    return p["trim"] == "rank_random" or (p["by"] == "row" and int(shape[-1] * min(p["density"])) >= 1)


def _chooser(stream: TensorStream, rows: bool) -> Callable[[Tensor | None, Tensor, int, int], tuple[Tensor, Tensor]]:
    """choose(base, model, number, offset) -> positions in the tensor and values of the kept entries of a flat piece:
    whole rows when `rows`, anything otherwise."""
    p = stream.parameters
    densities: list[float] = p["density"]
    gammas: list[float] | None = p["gamma"] if p["trim"] == "window" else None
    length = stream.shape[-1] if rows else stream.numel
    if rows and p["trim"] == "topk":

        def gather(base: Tensor | None, model: Tensor, i: int, offset: int) -> tuple[Tensor, Tensor]:
            origin = None if base is None else base.view(-1, length)
            found: tuple[Tensor, Tensor] = ops.expert_gather(
                origin, model.view(-1, length), densities[i], offset=offset
            )
            return found

        return gather
    mask = _masker(stream, rows, densities, gammas, length)

    def masked(base: Tensor | None, model: Tensor, i: int, offset: int) -> tuple[Tensor, Tensor]:
        delta = _delta(stream, base, model).view(-1)
        index = torch.from_numpy(np.flatnonzero(mask(delta, i, offset).view(-1).cpu().numpy()))
        return index + offset, delta[index.to(delta.device)]

    return masked


def _masker(
    stream: TensorStream, rows: bool, densities: list[float], gammas: list[float] | None, length: int
) -> Callable[[Tensor, int, int], Tensor]:
    p = stream.parameters
    if p["trim"] in ("random", "rank_random"):
        seed, name, epsilon = stream.seed, stream.name, p["epsilon"] if p["trim"] == "rank_random" else 0.0
        if epsilon and not rows:  # the ranks of a vector need all of it
            base, models = stream.whole()
            masks = [
                ops.random_mask(_delta(stream, base, m), d, epsilon=epsilon, seed=seed, name=name, stream=i).view(-1)
                for i, (m, d) in enumerate(zip(models, densities, strict=True))
            ]
            return lambda delta, i, offset: masks[i][offset : offset + delta.numel()]
        return lambda delta, i, offset: ops.random_mask(
            delta.view(-1, length) if rows else delta, densities[i], epsilon=epsilon, seed=seed, name=name, stream=i,
            offset=offset,
        )  # fmt: skip
    if rows:
        return lambda delta, i, _: _largest(delta.view(-1, length), densities[i], gammas[i] if gammas else None)
    rules = tensor_thresholds(stream, densities, gammas)
    return lambda delta, i, offset: rule_mask(delta, rules[i], offset)


def _largest(x: Tensor, density: float, gamma: float | None) -> Tensor:
    """bool [rows, n]: of every row the k largest, or those that follow the int(gamma·n) largest."""
    n = x.shape[1]
    low, high = (kept_count(density, n), 0) if gamma is None else window_counts(density, gamma, n)
    mask = _mask(x, low)
    return mask & ~_mask(x, high) if high else mask


def _mask(x: Tensor, k: int) -> Tensor:
    n = x.shape[1]
    # Half an element more than k / n, so that int() of the product is k whatever the rounding.
    mask: Tensor = ops.topk_mask(x, 0.0 if k == 0 else 1.0 if k >= n else (k + 0.5) / n, dim=-1)
    return mask


def _delta(stream: TensorStream, base: Tensor | None, model: Tensor) -> Tensor:
    return ops.weighted_sum(base, [model], 1.0, add_base=False, dtype=stream.compute)


def _filtered_sum(stream: TensorStream, rule: Rule, i: int) -> float:
    """Σ|G(v)| of model i's delta v, G the backbone's filter where it filters the tensor."""
    base, models = stream.whole()
    delta = _delta(stream, base, models[i])
    if rule.filters(stream.name, stream.shape):
        ops.highpass_filter(delta, rule.cutoff, mask=rule.mask, ring_double=rule.ring_double, out=delta)
    return _finite_sum(ops.abs_sum(None, [delta])[0])


def _joined(pieces: list[_Piece], stream: TensorStream) -> Sparse:
    """Pieces in order, in the stored dtype; entries that are zero there are dropped."""
    pieces.sort(key=lambda piece: piece[0])
    index = torch.cat([at for _, at, _ in pieces])
    value = torch.cat([v for _, _, v in pieces]).to(stream.out_dtype)
    there = value != 0
    if not bool(there.all()):
        index, value = index[there], value[there]
    return Sparse(tuple(stream.shape), index, value)


def _sums(whole: Tensor, squares: Tensor, kept: Sparse, count: int) -> _Sums:
    value = kept.value.double().abs()
    value = value[value.isfinite()]
    return _Sums(
        _finite_sum(whole),
        float(row_sums(value)),
        _finite_sum(squares),
        float(row_sums(value.square())),
        count,
        len(value),
    )


def _finite_sum(values: Tensor) -> float:
    """In index order; blocks that hold a NaN or an Inf are left out."""
    return math.fsum(v for v in values.tolist() if math.isfinite(v))

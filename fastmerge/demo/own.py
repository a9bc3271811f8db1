"""`fastmerge demo --models`: every method on one's own checkpoints, told apart by where the merges lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine import run
from ..errors import BadInput
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..io.pipeline import Source, opened
from ..job import Job
from ..methods import Method, get
from ..preflight import raise_all
from ..recipe import Recipe
from .measure import Cost, measured
from .rows import keywords
from .search import Parameters, axes, start, unknown

CHUNK = 1 << 20  # elements of a tensor that are compared at a time


@dataclass
class Line:
    """A model's distance from the base, and the cosine of its delta with each input's (None where a delta is zero)."""

    name: str
    kind: str  # "input" or "merge"
    norm: float
    relative: float  # norm over the base's
    cosines: dict[str, float | None]
    parameters: Parameters = field(default_factory=dict)
    cost: Cost | None = None


@dataclass
class OwnReport:
    labels: list[str]
    lines: list[Line]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_all(paths: Sequence[Path]) -> list[Checkpoint]:
    """The base and its models, opened and compared once for all methods, before anything is made of them.

    Raises BadInput for everything at once that headers show (files, names, shapes, kinds of dtype) and for integer
    buffers that differ; then for the first NaN or Inf, on which every merge would stop.
    """
    checkpoints: list[Checkpoint] = []
    problems: list[BadInput] = []
    for path in paths:
        try:
            checkpoints.append(open_checkpoint(path))
        except BadInput as error:
            problems.append(error)
    raise_all(problems, "the models")
    base, *models = checkpoints
    recipe = Recipe.from_call("task_arithmetic", str(paths[0]), [str(p) for p in paths[1:]], {"weight": 1.0})
    with opened(1) as (pool, files), torch.no_grad():
        job = Job(recipe, recipe.method, base, base, models, pool, files)
        for t in job.planned:
            for source in () if t.copied or t.base is None else (t.base, *t.models):
                for begin in range(0, t.numel, CHUNK):
                    if not source.read(begin, min(begin + CHUNK, t.numel), pool.buffers, "look").isfinite().all():
                        raise BadInput(
                            f"tensor {t.name!r} has NaN or Inf",
                            where=source.checkpoint.label,
                            remedy="repair the model, or merge it by a recipe with --nan warn",
                        )
    return checkpoints


def gram(base: Checkpoint, models: Sequence[Checkpoint]) -> tuple[torch.Tensor, float]:
    """Inner products ⟨θᵢ − θ₀, θⱼ − θ₀⟩ over all floating tensors [n, n] and ‖θ₀‖², in one read of every file."""
    total, square = torch.zeros(len(models), len(models), dtype=torch.float64), 0.0
    with opened(1) as (pool, files), torch.no_grad():
        for name in base.names():
            if not base.dtype(name).is_floating_point:
                continue
            sources = [Source(checkpoint, name, files) for checkpoint in (base, *models)]
            numel = math.prod(base.shape(name))
            for begin in range(0, numel, CHUNK):
                end = min(begin + CHUNK, numel)
                origin, *others = (s.read(begin, end, pool.buffers, f"{i}") for i, s in enumerate(sources))
                deltas = torch.stack([other.float() - origin.float() for other in others])
                total += (deltas @ deltas.T).double()
                square += float(origin.float().square().sum(dtype=torch.float64))
    return total, square


def _labels(paths: Sequence[Path]) -> list[str]:
    names = [p.name or str(p) for p in paths]
    return [f"{name}#{i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _parameters(method: Method, models: int) -> Parameters:
    chosen = start(method, axes(method))
    return {k: 1 / models if k == "weight" else v for k, v in chosen.items()}


def merge_own(paths: Sequence[str | Path], names: Sequence[str], out: Path, tell: Callable[[str], None]) -> OwnReport:
    """Merge paths[1:] onto paths[0] by every method called for, into out/<method>, and compare where they lie.

    Nothing is known that could choose parameters: they are the methods' defaults, weights 1/n, and the middle of the
    demo's grid where there is no default. Raises BadInput, before `out` is made, for models that do not fit together, and
    as the engine does when no method can merge them.
    """
    if len(paths) < 3:
        raise BadInput(
            f"--models got {len(paths)} checkpoint{'s' * (len(paths) != 1)}",
            remedy="give the base first, then two or more models fine-tuned from it",
        )
    base, *models = (Path(p) for p in paths)
    origin, *inputs = open_all([base, *models])
    made: list[Line] = []
    left_out: dict[str, str] = {}
    failed: list[BadInput] = []
    for name in names:
        method = get(name)
        least, most = method.models
        if method.needs_data or unknown(method) or len(models) < least or (most is not None and len(models) > most):
            left_out[name] = "needs data" if method.needs_data else "takes another number of models or more parameters"
            continue
        tell(name)
        parameters = _parameters(method, len(models))
        recipe = Recipe.from_call(
            name, None if method.base == "ignored" else str(base), [str(m) for m in models], keywords(parameters)
        )
        try:
            with measured() as cost:
                run(recipe, out / name, force=True)
        except BadInput as error:  # a method may not fit these networks (mudsc knows some architectures); others do
            failed.append(error)
            left_out[name] = error.message
            continue
        made.append(Line(name, "merge", 0.0, 0.0, {}, parameters, cost))
    if failed and not made:
        raise failed[0]
    tell("comparison")
    products, square = gram(origin, [*inputs, *(open_checkpoint(out / line.name) for line in made)])
    labels = _labels(models)
    lines = [Line(label, "input", 0.0, 0.0, {}) for label in labels] + made
    norms = products.diagonal().clamp(min=0).sqrt()
    for i, line in enumerate(lines):
        line.norm = float(norms[i])
        line.relative = line.norm / square**0.5 if square else 0.0
        line.cosines = {
            label: float(products[i, j] / (norms[i] * norms[j])) if norms[i] > 0 and norms[j] > 0 else None
            for j, label in enumerate(labels)
        }
    return OwnReport(labels, lines, left_out)

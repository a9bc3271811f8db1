"""The demo's rows of hard and soft Frank-Wolfe: merging driven by gradients on calibration images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ..fw import FrankWolfeResult, frank_wolfe, frank_wolfe_soft
from ..gradients import Gradient, gradient
from .family import DemoFamily
from .measure import measured
from .rows import Budget, Row, mean
from .search import Parameters
from .vit import load_checkpoint, logits, save_checkpoint
from .worker import one_thread

STARTS = (0.3, 0.5, 0.7)  # λ of the task arithmetic that the search starts from
WORKERS = 4  # batches that are differentiated at once; fixed, so that sums do not depend on the number of cores


def _gradient(family: DemoFamily, images: int) -> Gradient:
    """Of the mean cross-entropy over all tasks, on the first `images` calibration images of each."""

    def loss_of(head: torch.Tensor) -> Callable[[torch.nn.Module, Any], torch.Tensor]:
        return lambda model, batch: functional.cross_entropy(logits(model(batch[0]), head), batch[1])

    size = -(-images // WORKERS)
    batches = {
        name: [(x, y) for _, x, y in family.calibration(name, batch=size, limit=images)] for name in family.tasks
    }
    losses = {name: loss_of(head) for name, head in family.heads.items()}
    return gradient(family.model(), losses, batches, workers=WORKERS)


def _row(
    name: str,
    family: DemoFamily,
    out: Path,
    budget: Budget,
    settings: list[Parameters],
    solve: Callable[[Parameters], FrankWolfeResult],
) -> Row:
    """The best of `settings` on calibration images, with the cost of solving it once."""
    best, best_score, kept = settings[0], -1.0, None
    with measured() as searching:
        for parameters in settings:
            with measured() as cost, one_thread():
                state = solve(parameters).state_dict
            score = mean(family.evaluate(state, "calibration", limit=budget.calibration))
            if score > best_score:
                best, best_score, kept = parameters, score, (state, cost)
    assert kept is not None
    save_checkpoint(out, kept[0], family.settings.shape)
    accuracy = family.evaluate(load_checkpoint(out), limit=budget.test)
    return Row(name, "merge", accuracy, best, len(settings), searching.seconds, kept[1])


def hard_row(family: DemoFamily, out: Path, budget: Budget) -> Row:
    """Hard: short steps down the steepest vertex of each layer, from a task-arithmetic merge (the paper's start)."""
    ask = _gradient(family, budget.gradient)
    fixed = {"preset": "robust", "init": "merge", "iterations": budget.hard}
    settings: list[Parameters] = [{"scale": s, **fixed} for s in STARTS]

    def solve(parameters: Parameters) -> FrankWolfeResult:
        return frank_wolfe(family.base_dir, list(family.task_dirs.values()), ask, norm_cache=False, **parameters)

    return _row("frank_wolfe", family, out, budget, settings, solve)


def soft_row(family: DemoFamily, out: Path, budget: Budget) -> Row:
    """Soft: coefficients per layer of all tasks' vertices, found by projected gradient from a task-arithmetic merge.

    All vertices are in every step, so that one iteration searches the hull of the start and them.
    """
    ask = _gradient(family, budget.gradient)
    fixed = {"preset": "robust", "init": "merge", "iterations": 1, "inner_steps": budget.soft}
    settings: list[Parameters] = [{"scale": s, "top_k": len(family.tasks), **fixed} for s in STARTS]

    def solve(parameters: Parameters) -> FrankWolfeResult:
        return frank_wolfe_soft(family.base_dir, list(family.task_dirs.values()), ask, norm_cache=False, **parameters)

    return _row("frank_wolfe_soft", family, out, budget, settings, solve)

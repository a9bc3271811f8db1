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

STEP_SIZES = (0.1, 0.3, 1.0)  # 0.1 is the paper's


def _gradient(family: DemoFamily, images: int) -> Gradient:
    """Of the mean cross-entropy over all tasks, on the first `images` calibration images of each."""

    def loss_of(head: torch.Tensor) -> Callable[[torch.nn.Module, Any], torch.Tensor]:
        return lambda model, batch: functional.cross_entropy(logits(model(batch[0]), head), batch[1])

    batches = {
        name: [(x, y) for _, x, y in family.calibration(name, batch=images, limit=images)] for name in family.tasks
    }
    return gradient(family.model(), {name: loss_of(head) for name, head in family.heads.items()}, batches)


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
    """10 iterations of the paper's hard variant from the task-arithmetic merge."""
    ask = _gradient(family, budget.gradient)
    settings: list[Parameters] = [{"step_size": s} for s in STEP_SIZES]

    def solve(parameters: Parameters) -> FrankWolfeResult:
        return frank_wolfe(family.base_dir, list(family.task_dirs.values()), ask, norm_cache=False, **parameters)

    return _row("frank_wolfe", family, out, budget, settings, solve)


def soft_row(family: DemoFamily, out: Path, budget: Budget) -> Row:
    """Soft: coefficients per layer of all tasks' vertices, found by projected gradient."""
    ask = _gradient(family, budget.gradient)
    fixed = {"iterations": budget.soft[0], "inner_steps": budget.soft[1], "top_k": len(family.tasks)}
    settings: list[Parameters] = [{"constraint": "capped", **fixed}]

    def solve(parameters: Parameters) -> FrankWolfeResult:
        return frank_wolfe_soft(family.base_dir, list(family.task_dirs.values()), ask, norm_cache=False, **parameters)

    return _row("frank_wolfe_soft", family, out, budget, settings, solve)

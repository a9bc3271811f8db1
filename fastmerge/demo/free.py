"""The demo's rows of FREE-Merging: FR's backbone with one expert per task, told its task or routed by a small network."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from .. import experts
from ..engine import run
from ..experts import FreeModel
from ..merging import merge
from ..recipe import Recipe
from .family import DemoFamily
from .measure import measured
from .rows import Budget, Row, keywords, mean
from .search import METHOD_AXES, Parameters
from .vit import load_checkpoint, logits
from .worker import one_thread

DENSITIES = (0.01, 0.1)
FIXED: Parameters = {"by": "tensor", "mu": "balanced"}


def free_rows(family: DemoFamily, out: Path, budget: Budget) -> list[Row]:
    """Two rows for each density: the expert of the image's own task, and the one a trained router picks.

    λ of the backbone is chosen on calibration images with the experts in use; the router is trained on those images.
    Whatever the expert, the head is that of the image's task.
    """
    tasks = list(family.tasks)
    states = [family.state(t) for t in tasks]
    images = {t: family.split(t, "calibration", budget.calibration).images for t in tasks}
    with one_thread():
        router = experts.train(images, kind="image", epochs=40)
    made: list[Row] = []
    for density in DENSITIES:
        fixed: Parameters = {"density": density, **FIXED}
        kept = experts.extract(family.state(), states, tasks=tasks, **fixed)
        scores: dict[float, float] = {}
        with measured() as searching:
            for value in METHOD_AXES["fr"]["lambda"]:
                backbone = merge("fr", family.state(), states, lambda_=value)
                free = FreeModel(family.model(backbone), kept)
                scores[value] = mean(oracle(family, free, "calibration", budget.calibration))
        parameters: Parameters = {"lambda": max(scores, key=lambda v: scores[v]), **fixed}
        folder = out if density == DENSITIES[0] else out.with_name(f"{out.name}_{density:g}")
        recipe = Recipe.from_call(
            "free", str(family.base_dir), [str(d) for d in family.task_dirs.values()], keywords(parameters)
        )
        with measured() as cost:
            report = run(recipe, folder, force=True)
        free = FreeModel(family.model(load_checkpoint(folder)), folder / "experts", router=router)
        size, seconds = sum(report.files.values()) // len(tasks), swap_seconds(free)
        for how, accuracy in (
            ("oracle", oracle(family, free, "test", budget.test)),
            ("router", routed(family, free, "test", budget.test)),
        ):
            made.append(
                Row(
                    f"free {density:.0%} {how}", "routed", accuracy, parameters, len(scores), searching.seconds, cost,
                    expert_bytes=size, swap_seconds=seconds,
                )
            )  # fmt: skip
    return made


def oracle(family: DemoFamily, free: FreeModel, split: str, limit: int) -> dict[str, float]:
    """Accuracy of every task with its own expert in use."""
    found: dict[str, float] = {}
    for task in family.tasks:
        found |= family.accuracy(free.use(task).model, [task], split, limit)
    return found


@torch.inference_mode()
def routed(family: DemoFamily, free: FreeModel, split: str, limit: int) -> dict[str, float]:
    """Accuracy of every task when the router picks each image's expert."""
    found: dict[str, float] = {}
    for task in family.tasks:
        part = family.split(task, split, limit)
        chosen = logits(free(part.images), family.heads[task]).argmax(1)
        found[task] = int((chosen == part.labels).sum()) / len(part)
    return found


def swap_seconds(free: FreeModel, rounds: int = 20) -> float:
    """Median time to go from one expert to another, both used before."""
    for task in free.tasks:
        free.use(task)
    seconds = []
    for i in range(rounds):
        begin = time.perf_counter()
        free.use(free.tasks[i % len(free.tasks)])
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[rounds // 2]

"""The rows of the demo's table: the base, every fine-tune, and one merge by every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine import run
from ..merging import merge
from ..methods import Method, get, names
from ..recipe import Recipe
from .family import DemoFamily
from .measure import Cost, measured
from .search import Parameters, search, unknown
from .vit import load_checkpoint

State = dict[str, torch.Tensor]


@dataclass
class Row:
    """One line of the table. accuracy: of each task's test images; tried: parameter settings on calibration images."""

    name: str
    kind: str  # "base", "fine-tune", "merge", "routed" (weights depend on the image's task)
    accuracy: dict[str, float]
    parameters: Parameters = field(default_factory=dict)
    tried: int = 0
    search_seconds: float = 0.0
    cost: Cost | None = None
    note: str = ""
    expert_bytes: int | None = None  # of one task's expert file, on average
    swap_seconds: float | None = None  # from one expert to another

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean}


@dataclass(frozen=True)
class Budget:
    """How much data and work a run may use. Images are of each task."""

    calibration: int  # images that choose parameters
    test: int  # images that are reported
    gradient: int  # calibration images that gradients are taken on
    hard: int  # iterations of hard Frank-Wolfe
    soft: int  # evaluations of soft Frank-Wolfe's coefficients


QUICK = Budget(calibration=100, test=500, gradient=40, hard=4, soft=5)
FULL = Budget(calibration=300, test=1000, gradient=100, hard=4, soft=5)


def mean(accuracies: Mapping[str, float]) -> float:
    return sum(accuracies.values()) / len(accuracies)


@dataclass(frozen=True)
class Inputs:
    """What a method that takes `method.models` models gets of the family: (base, models, the tasks that judge it)."""

    base: str | None
    models: list[str]
    tasks: list[str]


def inputs_for(method: Method, tasks: list[str]) -> Inputs | str:
    """The inputs, or the reason why the demo has none for this method. "" names the base."""
    least, most = method.models
    if method.needs_data:
        return "needs data"
    if missing := unknown(method):
        return f"the demo has no value for its {', '.join(missing)}"
    if most is None or most >= len(tasks):
        return Inputs(None if method.base == "ignored" else "", tasks, tasks)
    if most >= 2 >= least:
        return Inputs(None if method.base == "ignored" else "", tasks[:2], tasks[:2])
    if most == 1 and method.base == "required":  # its base is the first endpoint
        return Inputs(tasks[0], [tasks[1]], tasks[:2])
    return "copies one model"


class Merger:
    """Merges of one family by one method: in memory while parameters are sought, by the engine when they are found."""

    def __init__(self, family: DemoFamily, budget: Budget) -> None:
        self.family, self.budget = family, budget
        self.states: dict[str, State] = {"": family.state(), **{t: family.state(t) for t in family.tasks}}
        self.dirs: dict[str, Path] = {"": family.base_dir, **family.task_dirs}

    def row(self, name: str, out: Path) -> Row | str:
        """Merge by method `name` into `out`; the row, or why there is none."""
        method, inputs = get(name), inputs_for(get(name), list(self.family.tasks))
        if isinstance(inputs, str):
            return inputs
        base = None if inputs.base is None else self.states[inputs.base]
        models = [self.states[m] for m in inputs.models]

        def score(parameters: Parameters) -> float:
            state = merge(name, base, models, **keywords(parameters))
            return mean(self.family.evaluate(state, "calibration", inputs.tasks, self.budget.calibration))

        with measured() as searching:
            parameters, tried = search(method, score)
        recipe = Recipe.from_call(
            name,
            None if inputs.base is None else str(self.dirs[inputs.base]),
            [str(self.dirs[m]) for m in inputs.models],
            keywords(parameters),
        )
        with measured() as cost:
            run(recipe, out, force=True)
        accuracy = self.family.evaluate(load_checkpoint(out), "test", inputs.tasks, self.budget.test)
        return Row(name, "merge", accuracy, parameters, tried, searching.seconds, cost)


def keywords(parameters: Parameters) -> dict[str, Any]:
    """Recipe parameters as Python keywords."""
    return {("lambda_" if k == "lambda" else k): v for k, v in parameters.items()}


def plain_rows(family: DemoFamily, test: int) -> list[Row]:
    """The base and each fine-tune on all tasks, and the fine-tunes each on its own task."""
    rows = [Row("base", "base", family.evaluate(family.state(), limit=test), note="before fine-tuning")]
    for task in family.tasks:
        rows.append(
            Row(task, "fine-tune", family.evaluate(family.state(task), limit=test), note="one task's fine-tune")
        )
    own = {row.name: row.accuracy[row.name] for row in rows[1:]}
    rows.append(Row("individual", "fine-tune", own, note="each fine-tune on its own task: as many models as tasks"))
    return rows


def _special() -> dict[str, Callable[[DemoFamily, Path, Budget], Row | list[Row]]]:
    """Methods that see data or make more than one model, each with its own way of making its rows."""
    from .frank_wolfe import hard_row, soft_row
    from .free import free_rows

    return {"frank_wolfe": hard_row, "frank_wolfe_soft": soft_row, "free": free_rows}


def row_names() -> list[str]:
    """Everything the demo can merge by."""
    return sorted({*names(), *_special()})


def merge_rows(
    family: DemoFamily, wanted: list[str], out: Path, budget: Budget, tell: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    """One row per method and, for those that have none, the reason."""
    merger, special = Merger(family, budget), _special()
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for name in wanted:
        tell(name)
        row = special[name](family, out / name, budget) if name in special else merger.row(name, out / name)
        if isinstance(row, str):
            left_out[name] = row
        else:
            rows += row if isinstance(row, list) else [row]
    return rows, left_out

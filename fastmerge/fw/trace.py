"""What a Frank-Wolfe run did, step by step: saved as JSON, drawn as a plot."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadInput

VERSION = 1


@dataclass
class Iteration:
    """One step. Layer granularity: one entry per tensor of ``Trace.layers``; model: one for all."""

    iteration: int
    loss: float | None  # of the calibration data before the step, when known
    gap: float  # Frank-Wolfe duality gap before the step
    gamma: float  # the step rule's γ; short steps of layers, and soft: the mean over layers
    coefficient: float  # what the vertex is weighted with: scale·γ for the decaying rules, γ for the searching ones
    choices: list[Any]  # hard: a candidate's index, -1 the zero vertex; soft: a list of them
    scores: list[Any]  # of the choices
    margins: list[float | None]  # by how much the runner-up is worse (None: there is none)
    coefficients: list[Any] | None = None  # soft: one list per layer, as `choices`; short steps: γ of each layer
    inner_losses: list[float] | None = None  # soft: calibration loss along the search for the coefficients
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Trace:
    """Settings, candidates and iterations of a run."""

    settings: dict[str, Any]
    candidates: list[str]
    layers: list[str] = field(default_factory=list)
    iterations: list[Iteration] = field(default_factory=list)
    stopped: str = ""
    duplicates: list[tuple[int, int]] = field(default_factory=list)

    def to_json(self) -> str:
        content = {"version": VERSION, **asdict(self)}
        return json.dumps(_finite(content), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write the JSON, replacing an older one in one step."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(self.to_json() + "\n")
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a saved trace; raises BadInput for a file that is not one."""
        try:
            content = json.loads(Path(path).read_text())
            if content.pop("version") != VERSION:
                raise KeyError("version")
            iterations = [Iteration(**i) for i in content.pop("iterations")]
            duplicates = [(int(a), int(b)) for a, b in content.pop("duplicates")]
            return cls(**content, iterations=iterations, duplicates=duplicates)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(
                f"is not a Frank-Wolfe trace ({error!r})",
                where=str(path),
                remedy="check the path: frank_wolfe(trace=PATH) and Trace.save write such files",
            ) from error

    def shares(self) -> list[list[float]]:
        """Per iteration, the share of layers that moved towards each candidate; the last column is the zero vertex.

        Layers without a gradient (None among the choices) do not count.
        """
        out = []
        for it in self.iterations:
            counts = [0.0] * (len(self.candidates) + 1)
            chosen = [c if isinstance(c, list) else [c] for c in it.choices if c is not None]
            for picks in chosen:
                for k in picks:
                    counts[k if k >= 0 else -1] += 1 / (len(picks) * len(chosen))
            out.append(counts)
        return out

    def plot(self, path: str | Path) -> Path:
        """Loss and gap, share of choices per candidate, and the choice of each layer, as an image file.

        Raises BadInput when matplotlib is not installed or there is nothing to draw.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BadInput("plots need matplotlib", remedy="pip install 'fastmerge[plot]'") from error
        if not self.iterations:
            raise BadInput(
                "the trace has no iterations to draw", remedy="plot the trace of a run with iterations=1 or more"
            )
        figure = Figure(figsize=(14, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3)
        steps = [i.iteration for i in self.iterations]
        losses = [(i.iteration, i.loss) for i in self.iterations if i.loss is not None]
        left.plot(steps, [i.gap for i in self.iterations], "o-", color="tab:blue")
        left.set(xlabel="iteration", title="duality gap and calibration loss")
        left.set_ylabel("gap", color="tab:blue")
        if losses:
            twin = left.twinx()
            twin.plot(*zip(*losses, strict=True), "s--", color="tab:red")
            twin.set_ylabel("loss", color="tab:red")
        shares = self.shares()
        names = [Path(c).name for c in self.candidates] + ["zero vertex"]
        bottom = [0.0] * len(steps)
        for k, name in enumerate(names):
            column = [row[k] for row in shares]
            if any(column):
                middle.bar(steps, column, bottom=bottom, label=name)
                bottom = [a + b for a, b in zip(bottom, column, strict=True)]
        middle.set(xlabel="iteration", ylabel="share of the layers", title="chosen candidates")
        middle.legend(fontsize=7, loc="lower right")
        first = [
            [math.nan if c is None else c[0] if isinstance(c, list) else c for c in i.choices] for i in self.iterations
        ]
        image = right.imshow(
            list(zip(*first, strict=True)), aspect="auto", interpolation="nearest", cmap="tab20", vmin=-1,
            vmax=max(len(self.candidates) - 1, 0), extent=(-0.5, len(steps) - 0.5, len(first[0]) - 0.5, -0.5),
        )  # fmt: skip
        right.set(xlabel="iteration", ylabel="layer", title="choice per layer (-1: zero vertex)")
        figure.colorbar(image, ax=right)
        path = Path(path)
        figure.savefig(path, dpi=120)
        return path


def _finite(value: Any) -> Any:
    """JSON has no infinities: the margin of a single candidate becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value

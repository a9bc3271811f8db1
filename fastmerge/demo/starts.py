"""The demo's second table: two networks that no fine-tuning relates (:mod:`.pair`), merged with and without alignment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch.nn import functional

from ..structure import Alignment, PermutationSpec, mudsc, spec_for
from .measure import measured
from .pair import DemoPair, save_network

SHARES = (0.3, 0.5, 0.8)  # weight shares that MuDSC chooses from, on calibration images
SWEEPS = 12
COLUMNS = ("joint", "0-4", "5-9")


@dataclass
class StartRow:
    """One line. accuracy: of the test images of all classes and of each half; share: of weight space, where chosen."""

    name: str
    kind: str  # "network", "ensemble", "merge"
    accuracy: dict[str, float]
    note: str = ""
    share: float | None = None
    objective: float | None = None  # mean similarity of matched units
    sweeps: int | None = None
    seconds: float = 0.0
    folder: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Ensemble(nn.Module):
    """Both networks run: the sum of their normalised features."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([functional.normalize(m(x), dim=1) for m in self.models]).sum(0)


def _nothing(spec: PermutationSpec) -> Alignment:
    return Alignment(spec, [{}, {}], [[], []], 1.0, [{}, {}])


def start_rows(pair: DemoPair, out: Path, tell: Callable[[str], None] = lambda _name: None) -> list[StartRow]:
    """The networks, both together, and every merge of them; merges are saved as out/<row>.

    The permutation spec is traced from the module. Every merge re-estimates its BatchNorm statistics on the same
    unlabelled images; MuDSC picks its weight share on calibration images.
    """
    models: list[nn.Module] = [pair.model(0), pair.model(1)]
    images = pair.images()
    spec = spec_for(models[0], images[0][:2])
    rows = [
        StartRow(f"network {i + 1}", "network", pair.evaluate(m), f"trained on {half} only")
        for i, (m, half) in enumerate(zip(models, COLUMNS[1:], strict=True))
    ]
    rows.append(StartRow("ensemble", "ensemble", pair.evaluate(_Ensemble(models)), "both networks run on every image"))

    def score(found: Any) -> float:
        merged = mudsc(models, alignment=found, reset_batchnorm=images).model
        assert merged is not None
        return pair.evaluate(merged.eval(), "calibration")["joint"]

    both: dict[str, Any] = {"activations": images, "weight_share": SHARES, "score": score, "sweeps": SWEEPS}
    merges: list[tuple[str, str, dict[str, Any]]] = [
        ("average", "as they are", {"alignment": _nothing(spec)}),
        ("activation only", "units that fire together", {"activations": images, "preset": "activation"}),
        ("weight only", "Git Re-Basin's matching", {"weight_share": 1.0, "sweeps": SWEEPS}),
        ("MuDSC align", "one to one, in both spaces", both),
        ("MuDSC zip", "many to one, in both spaces", {**both, "match": "zip"}),
    ]
    for name, note, options in merges:
        tell(name)
        with measured() as cost:
            result = mudsc(models, spec, reset_batchnorm=images, **options)
        assert result.model is not None
        found, trace = result.alignment, result.alignment.trace[1]
        folder = out / name.replace(" ", "-").lower()
        shutil.rmtree(folder, ignore_errors=True)
        save_network(folder, result.model.state_dict(), pair.settings)
        row = StartRow(
            name, "merge", pair.evaluate(result.model.eval()), note, seconds=cost.seconds, folder=str(folder)
        )
        if trace:
            row.objective, row.sweeps = found.objective, len(trace)
        if name.startswith("MuDSC"):
            row.share = found.weight_share
        rows.append(row)
    return rows


def start_table(pair: DemoPair, rows: list[StartRow]) -> Table:
    """The rows for a terminal: accuracy in percent, the best merge of each column in green."""
    size = sum(t.numel() for t in pair.model(0).state_dict().values())
    title = (
        f"networks from different starts: two convolutional networks of {size / 1e6:.2f} M, each trained from its own "
        f"seed on half of the digits (accuracy, %; {len(pair.task.test)} test images)"
    )
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("merge by", no_wrap=True)
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right", style="bold" if name == "joint" else "")
    table.add_column("weight share", justify="right")
    table.add_column("matched similarity", justify="right")
    table.add_column("s", justify="right")
    best = {c: max(r.accuracy[c] for r in rows if r.kind == "merge") for c in COLUMNS}
    for before, row in zip([rows[0], *rows], rows, strict=False):
        if before.kind != row.kind:
            table.add_section()
        cells = [f"{100 * row.accuracy[c]:.1f}" for c in COLUMNS]
        if row.kind == "merge":
            cells = [
                f"[bold green]{x}[/]" if row.accuracy[c] == best[c] else x for c, x in zip(COLUMNS, cells, strict=True)
            ]
        table.add_row(
            row.name,
            f"[dim]{row.note}[/]",
            *cells,
            "" if row.share is None else f"{row.share:g}",
            "" if row.objective is None else f"{row.objective:.2f}",
            f"{row.seconds:.2f}" if row.kind == "merge" else "",
        )
    return table

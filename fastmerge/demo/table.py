"""The demo's tables, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .rows import Row

if TYPE_CHECKING:
    from .own import OwnReport


def _percent(value: float | None, best: bool = False) -> str:
    if value is None:
        return ""
    text = f"{100 * value:.1f}"
    return f"[bold green]{text}[/]" if best else text


def _size(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**20:.1f}"


def _parameters(row: Row) -> str:
    return _listed({k: v for k, v in row.parameters.items() if not (k == "weight" and v == 1.0)})


def _listed(shown: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


def accuracy_table(title: str, rows: Sequence[Row], tasks: Sequence[str], judged: Sequence[str] = ("merge",)) -> Table:
    """Accuracy in percent, the best merge of each column in green; time and memory of the final merge."""
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("chosen on calibration data")
    for task in tasks:
        table.add_column(task, justify="right")
    table.add_column("mean", justify="right", style="bold")
    table.add_column("ms", justify="right")
    table.add_column("MiB", justify="right")
    experts = any(r.expert_bytes is not None for r in rows)
    if experts:
        table.add_column("kB/expert", justify="right")
        table.add_column("swap ms", justify="right")
    merges = [r for r in rows if r.kind in judged]
    best = {t: max((r.accuracy.get(t, 0.0) for r in merges), default=0.0) for t in tasks}
    best_mean = max((r.mean for r in merges), default=0.0)
    kind = rows[0].kind if rows else ""
    for row in rows:
        if row.kind != kind:
            table.add_section()
            kind = row.kind
        judge = row.kind in judged
        table.add_row(
            row.name,
            _parameters(row) if row.kind in ("merge", "routed") else f"[dim]{row.note}[/]",
            *(_percent(row.accuracy.get(t), judge and row.accuracy.get(t) == best[t]) for t in tasks),
            _percent(row.mean, judge and row.mean == best_mean),
            "" if row.cost is None else f"{1e3 * row.cost.seconds:.0f}",
            "" if row.cost is None else _size(row.cost.memory),
            *(_expert(row) if experts else ()),
        )
    return table


def _expert(row: Row) -> tuple[str, str]:
    """Bytes of one expert's file and the time of a swap."""
    if row.expert_bytes is None or row.swap_seconds is None:
        return "", ""
    return f"{row.expert_bytes / 1e3:.1f}", f"{1e3 * row.swap_seconds:.2f}"


def geometry_table(report: OwnReport) -> Table:
    """Norms and angles of merges of checkpoints that the demo can not evaluate."""
    table = Table(title="distance from the base, and direction", title_justify="left", header_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("parameters")
    table.add_column("‖θ − base‖", justify="right")
    table.add_column("relative", justify="right")
    for label in report.labels:
        table.add_column(f"cos {label}", justify="right")
    table.add_column("s", justify="right")
    table.add_column("MiB", justify="right")
    previous = "input"
    for line in report.lines:
        if line.kind != previous:
            table.add_section()
            previous = line.kind
        cells: Mapping[str, float | None] = line.cosines
        table.add_row(
            line.name,
            _listed(line.parameters),
            f"{line.norm:.4g}",
            f"{line.relative:.3g}",
            *("" if cells[label] is None else f"{cells[label]:.3f}" for label in report.labels),
            "" if line.cost is None else f"{line.cost.seconds:.2f}",
            "" if line.cost is None else _size(line.cost.memory),
        )
    return table

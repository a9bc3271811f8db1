"""The `fastmerge demo` command."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import methods as registry
from ..errors import BadInput
from ..report import Clock
from .chart import check_matplotlib, save_chart, save_geometry
from .family import prepare
from .measure import machine
from .own import merge_own
from .pair import FULL as FULL_PAIR
from .pair import QUICK as QUICK_PAIR
from .pair import prepare_pair
from .rows import FULL, QUICK, merge_rows, plain_rows, row_names
from .starts import start_rows, start_table
from .table import accuracy_table, geometry_table


def _console(json: bool) -> Console:
    console = Console(stderr=json)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a log file has no width to fit into
    return console


@contextmanager
def _shown(console: Console, steps: int | None = None) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on terminals, one line per finished step elsewhere; yields tell(what, share done)."""
    if not console.is_terminal:

        def tell(what: str, share: float) -> None:
            if share >= 1:
                console.print(f"  {what}", highlight=False)

        yield tell
        return
    columns = (TextColumn("  {task.description:<18}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        lines: dict[str, Any] = {}

        def show(what: str, share: float) -> None:
            if what not in lines:
                lines[what] = bar.add_task(what, total=1.0)
            bar.update(lines[what], completed=share)

        yield show


def _chosen(names: Sequence[str] | None, known: list[str]) -> list[str]:
    return [name if name in known else registry.get(name).name for name in dict.fromkeys(names or known)]


def main(
    models: Sequence[str | os.PathLike[str]] | None = None,
    quick: bool = False,
    out: str | os.PathLike[str] = "demo-out",
    cache: str | os.PathLike[str] | None = None,
    json: bool = False,
    methods: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Merge real networks by every method, print a table, save a chart and every merge under `out`.

    Args:
        models: one's own checkpoints, the base first, instead of the demo's: norms and cosines are then reported
            instead of accuracy, since no evaluation is known.
        quick: the small network: about 2 minutes in all on two cores the first time instead of about 12.
        out: folder for the merged checkpoints (out/<method>), demo.json and demo.png.
        cache: folder for images and trained networks (default: ~/.cache/fastmerge).
        json: print the results as one JSON document on stdout, everything else on stderr.
        methods: only these.

    Returns what demo.json holds.
    Raises: BadInput for unknown methods and checkpoints that can not be merged; sources.DataUnavailable.
    """
    console, clock, folder = _console(json), Clock(), Path(out)
    names = _chosen(methods, registry.names() if models else row_names())
    if folder.exists() and not folder.is_dir():
        raise BadInput("the output is a file", where=str(folder), remedy="name a folder")
    check_matplotlib()
    result = _own(console, models, names, folder) if models else _family(console, quick, cache, names, folder)
    result["machine"], result["threads"] = machine(), torch.get_num_threads()
    result["seconds"]["all"] = round(clock.wall(), 1)
    report = folder / "demo.json"
    text = _dumps(result)
    report.write_text(text + "\n")
    console.print(f"{result['seconds']['all']:.0f} s on {result['machine']}; {report}", highlight=False)
    if json:
        print(text)
    return result


def _dumps(result: dict[str, Any]) -> str:
    import json

    return json.dumps(result, indent=1)


def _own(console: Console, models: Sequence[str | os.PathLike[str]], names: list[str], folder: Path) -> dict[str, Any]:
    report = merge_own([Path(m) for m in models], names, folder, lambda what: console.print(f"  {what}"))
    folder.mkdir(parents=True, exist_ok=True)
    console.print(geometry_table(report))
    _print_left_out(console, report.left_out)
    chart = folder / "demo.png"
    save_geometry(chart, report, f"{len(report.labels)} models and their merges, as seen from {Path(models[0]).name}")
    console.print(f"chart: {chart}", highlight=False)
    return {**report.to_dict(), "chart": str(chart), "seconds": {}}


def _family(
    console: Console, quick: bool, cache: str | os.PathLike[str] | None, names: list[str], folder: Path
) -> dict[str, Any]:
    clock = Clock()
    console.print("images and networks (trained once, then cached)", highlight=False)
    with _shown(console) as tell:
        family = prepare(quick, cache, tell)
    prepared, clock = clock.wall(), Clock()
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"  {family.base_dir.parent}: {prepared:.1f} s", highlight=False)
    console.print(f"merging by {len(names)} methods", highlight=False)
    budget = QUICK if quick else FULL
    rows = plain_rows(family, budget.test)
    merges, left_out = merge_rows(family, names, folder, budget, lambda name: console.print(f"  {name}"))
    tasks = list(family.tasks)
    whole = [row for row in merges if set(row.accuracy) == set(tasks)]
    pairs = [row for row in merges if row not in whole]
    count = f"{len(tasks)} tasks, {budget.test * len(tasks)} test images"
    console.print(accuracy_table(f"accuracy, % ({count})", rows + whole, tasks))
    if pairs:
        two = tasks[:2]
        title = f"methods of two models: {two[0]} + {two[1]}"
        console.print(accuracy_table(title, pairs, two))
    starts = _starts(console, quick, cache, folder) if "mudsc" in names else []
    _print_left_out(console, left_out)
    chart = folder / "demo.png"
    if whole:
        width, parameters = family.settings.shape.width, sum(t.numel() for t in family.state().values())
        title = f"{len(tasks)} fine-tunes of a {parameters / 1e6:.2f} M vision transformer (width {width}), merged"
        save_chart(chart, rows + whole, tasks, title)
        console.print(f"chart: {chart}", highlight=False)
    return {
        "quick": quick,
        "family": str(family.base_dir.parent),
        "tasks": {t.name: {"title": t.title, "classes": t.classes, "test": budget.test} for t in family.tasks.values()},
        "calibration_images_per_task": budget.calibration,
        "rows": [row.to_dict() for row in rows + whole],
        "pairs": [row.to_dict() for row in pairs],
        "different_starts": starts,
        "left_out": left_out,
        "chart": str(chart) if whole else None,
        "seconds": {"prepare": round(prepared, 1), "merge_and_evaluate": round(clock.wall(), 1)},
    }


def _starts(console: Console, quick: bool, cache: str | os.PathLike[str] | None, folder: Path) -> list[dict[str, Any]]:
    """The table of the pair that was trained from different seeds."""
    console.print("two networks from different starts (trained once, then cached)", highlight=False)
    pair = prepare_pair(cache, QUICK_PAIR if quick else FULL_PAIR)
    rows = start_rows(pair, folder / "different-starts", lambda name: console.print(f"  {name}", highlight=False))
    console.print(start_table(pair, rows))
    return [row.to_dict() for row in rows]


def _print_left_out(console: Console, left_out: dict[str, str]) -> None:
    if left_out:
        console.print("not here: " + "; ".join(f"{n} ({why})" for n, why in left_out.items()), highlight=False)

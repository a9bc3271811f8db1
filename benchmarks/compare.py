"""Saved runs side by side: ratios between machines, backends and commits as a table, and one self-contained page.

``fastmerge bench compare a.jsonl b.jsonl ... [--html bench.html]``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastmerge.errors import BadInput

from .page import page
from .run import wide_console
from .schema import Row, read


@dataclass(frozen=True)
class Saved:
    """One file of rows."""

    label: str  # "A", "B", ...
    file: str
    rows: list[Row]

    @property
    def describe(self) -> str:
        r = self.rows[0]
        versions = {"driver": r.driver, "triton": r.triton, "cupy": r.cupy}
        extra = "".join(f", {name} {version}" for name, version in versions.items() if version)
        return f"{r.device}, {r.threads} threads, torch {r.torch}{extra}, commit {r.commit or 'unknown'}, {r.date}"


def load(files: Sequence[Path]) -> list[Saved]:
    """The files as A, B, ...; raises BadInput for one that can not be read, and for fewer than two."""
    if len(files) < 2:
        raise BadInput(
            f"compare needs at least two files, not {len(files)}", remedy="fastmerge bench --save FILE makes one"
        )
    if len(files) > 6:
        raise BadInput(f"compare takes at most six files, not {len(files)}", remedy="leave some out")
    return [Saved(chr(ord("A") + i), str(f), read(f)) for i, f in enumerate(files)]


def ratios(saved: Sequence[Saved]) -> list[tuple[tuple[str, str, str], list[float | None]]]:
    """Per (operator, variant, backend) that at least two files timed: median seconds in each, None where it was not."""
    times: dict[tuple[str, str, str], list[float | None]] = {}
    for i, s in enumerate(saved):
        for r in s.rows:
            if r.p50_s is not None:
                times.setdefault(r.key, [None] * len(saved))[i] = r.p50_s
    return [(key, values) for key, values in times.items() if sum(v is not None for v in values) >= 2]


def compare(files: Sequence[Path], html: Path, console: Console | None = None) -> None:
    """Print the table and write the page; raises BadInput."""
    console = console or wide_console()
    saved = load(files)
    both = ratios(saved)
    if not both:
        raise BadInput("the files have no timed row in common", remedy="measure the same operators in each")
    for s in saved:
        console.print(f"{s.label}: {s.file}: {s.describe}", highlight=False, soft_wrap=True)
    out = Table(title="median times; ratios above 1: A is slower", title_justify="left")
    for heading in ("operator", "variant", "backend"):
        out.add_column(heading, no_wrap=True)
    for s in saved:
        out.add_column(f"{s.label} ms", justify="right")
    for s in saved[1:]:
        out.add_column(f"A / {s.label}", justify="right")
    for key, values in both:
        first = values[0]
        cells = ["" if v is None else f"{v * 1e3:.2f}" for v in values]
        against = ["" if v is None or first is None else f"{first / v:.2f}" for v in values[1:]]
        out.add_row(*key, *cells, *against)
    console.print(out)
    html.write_text(page([(s.label, s.file, s.describe, s.rows) for s in saved], both), encoding="utf-8")
    console.print(f"wrote {html}", highlight=False, soft_wrap=True)

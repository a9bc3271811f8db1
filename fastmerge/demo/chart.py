"""The demo's bar charts: mean accuracy of every merge between that of the base and of the individual fine-tunes; of one's
own models, how far from the base every merge lies, and in which direction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInput
from .rows import Row

if TYPE_CHECKING:
    from .own import OwnReport

TASK_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#9d755d", "#e45756")


def check_matplotlib() -> None:
    """Raises BadInput without matplotlib: before the demo's minutes of work, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BadInput("the demo's chart needs matplotlib", remedy="pip install 'fastmerge[demo]'") from error


def save_chart(path: Path, rows: Sequence[Row], tasks: Sequence[str], title: str) -> None:
    """Bars are means over tasks, dots single tasks; best merge on top. PNG or SVG by the path's suffix."""
    from matplotlib.figure import Figure

    base = next(r for r in rows if r.kind == "base")
    own = next(r for r in rows if r.name == "individual")
    merges = sorted((r for r in rows if r.kind in ("merge", "routed")), key=lambda r: r.mean)
    figure = Figure(figsize=(9, 1.9 + 0.3 * len(merges)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    at = range(len(merges))
    colors = ["#8d9db6" if r.kind == "merge" else "#bcd4a8" for r in merges]
    axes.barh(at, [100 * r.mean for r in merges], color=colors, height=0.68, zorder=2)
    for k, task in enumerate(tasks):
        axes.scatter(
            [100 * r.accuracy[task] for r in merges], at, s=16, color=TASK_COLORS[k % len(TASK_COLORS)],
            edgecolors="white", linewidths=0.5, zorder=4, label=task,
        )  # fmt: skip
    for row, style, words in ((base, ":", "base"), (own, "--", "individual fine-tunes")):
        axes.axvline(100 * row.mean, color="#333333", linestyle=style, linewidth=1.2, zorder=3)
        axes.annotate(
            f"{words} {100 * row.mean:.1f}", (100 * row.mean, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha="right" if row is base else "center", fontsize=8.5,
        )  # fmt: skip
    lowest = min([100 * r.accuracy[t] for r in merges for t in tasks] + [100 * base.mean])
    left = max(0.0, 5 * (lowest // 5) - 5)
    axes.set_xlim(left, 102)
    axes.set_yticks(list(at), [r.name for r in merges], fontsize=9)
    for y, row in zip(at, merges, strict=True):
        axes.text(left + 0.4, y, f"{100 * row.mean:.1f}", va="center", ha="left", fontsize=8.5, color="white", zorder=5)
    axes.set_ylim(-0.6, len(merges) - 0.4)
    axes.set_xlabel("test accuracy, %  (bar: mean over tasks; dots: each task)")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(tasks), frameon=False, fontsize=8.5
    )
    figure.savefig(path)


def save_geometry(path: Path, report: OwnReport, title: str) -> None:
    """Bars are distances from the base over its length, dots cosines with each model's delta; inputs on top."""
    from matplotlib.figure import Figure

    merges = sorted((line for line in report.lines if line.kind == "merge"), key=lambda line: line.relative)
    lines = [*merges, *reversed([line for line in report.lines if line.kind == "input"])]
    figure = Figure(figsize=(9, 1.9 + 0.3 * len(lines)), dpi=150, layout="constrained")
    bars, dots = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    at = range(len(lines))
    colors = ["#8d9db6" if line.kind == "merge" else "#bcd4a8" for line in lines]
    bars.barh(at, [100 * line.relative for line in lines], color=colors, height=0.68, zorder=2)
    for y, line in zip(at, lines, strict=True):
        bars.annotate(
            f"{100 * line.relative:.3g}", (100 * line.relative, y), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=8.5,
        )  # fmt: skip
    bars.margins(x=0.12)
    bars.set_yticks(list(at), [line.name for line in lines], fontsize=9)
    bars.set_ylim(-0.6, len(lines) - 0.4)
    bars.set_xlabel("‖θ − base‖ / ‖base‖, %")
    for k, label in enumerate(report.labels):
        known = [(cosine, y) for y, line in zip(at, lines, strict=True) if (cosine := line.cosines[label]) is not None]
        dots.scatter(
            [x for x, _ in known], [y for _, y in known], s=22, color=TASK_COLORS[k % len(TASK_COLORS)],
            edgecolors="white", linewidths=0.5, zorder=4, label=label,
        )  # fmt: skip
    lowest = min((c for line in lines for c in line.cosines.values() if c is not None), default=0.0)
    dots.set_xlim(min(0.0, lowest) - 0.05, 1.05)
    dots.set_xlabel("cosine of θ − base with each model's")
    for axes in (bars, dots):
        axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.legend(
        *dots.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(report.labels), 6), frameon=False,
        fontsize=8.5,
    )  # fmt: skip
    figure.savefig(path)

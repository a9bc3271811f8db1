"""One HTML page of saved runs: rooflines, bars and tables, SVG inside it, nothing fetched from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from .schema import Row

Run = tuple[str, str, str, list[Row]]  # label, file, description, rows
Key = tuple[str, str, str]
COLOURS = (
    "#1f5fa8",
    "#c2570c",
    "#2e7d32",
    "#7b3fa0",
    "#8a6d00",
    "#5f6b76",
)  # told apart on white by all kinds of sight
SHAPES = ("circle", "square", "triangle", "diamond", "circle", "square")
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.note { color: #4a5563; margin-top: .2rem; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { color: #4a5563; font-size: .9rem; }
svg { max-width: 100%; height: auto; } svg text { font: 13px system-ui, sans-serif; fill: #1c2430; }
svg .soft { fill: #4a5563; font-size: 12px; } svg .grid { stroke: #e3e7ec; } svg .axis { stroke: #8b95a1; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e3e7ec; text-align: left; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
thead th { border-bottom: 2px solid #8b95a1; } tbody tr:hover { background: #f5f7fa; }
details { margin-top: 1rem; }
ul.runs { list-style: none; padding: 0; } ul.runs li { margin: .3rem 0; } .swatch { display: inline-block; width: .8em; height: .8em; margin-right: .5em; }
"""


def page(runs: Sequence[Run], both: Sequence[tuple[Key, list[float | None]]]) -> str:
    """The whole document; `both` as compare.ratios gives it."""
    parts = ["<h1>fastmerge benchmarks compared</h1>", '<ul class="runs">']
    for i, (label, file, said, _) in enumerate(runs):
        parts.append(
            f'<li><span class="swatch" style="background:{COLOURS[i]}"></span><strong>{label}</strong> '
            f"{escape(file)}<br/><small>{escape(said)}</small></li>"
        )
    parts += ["</ul>", "<h2>Rooflines</h2>"]
    parts.append(
        '<p class="note">Each line is what a machine could do at most: its measured copy bandwidth times the flops per '
        "byte, and no more than its measured matrix product. Each mark is an operator's quickest backend.</p>"
    )
    parts.append(
        _figure(_roofline(runs), "Gflop/s over flops per byte, both logarithmic. Point at a mark for its name.")
    )
    parts.append("<h2>Share of the ceiling</h2>")
    parts.append(
        '<p class="note">The least time that the bytes and flops allow at the measured ceilings, over the median time. '
        "Every operator's quickest backend.</p>"
    )
    parts.append(_figure(_bars(runs), "Per cent of the nearer ceiling."))
    parts.append("<h2>Times</h2>" + _table(runs, both))
    for label, _, _, rows in runs:
        skipped = {(r.backend, r.skipped) for r in rows if r.skipped}
        if skipped:
            items = "".join(f"<li>{escape(b)}: {escape(str(why))}</li>" for b, why in sorted(skipped, key=str))
            parts.append(f"<details><summary>Not run in {label}</summary><ul>{items}</ul></details>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>fastmerge benchmarks</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n'
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _best(rows: Iterable[Row]) -> list[Row]:
    """The quickest of fastmerge's own backends for every operator and variant."""
    found: dict[tuple[str, str], Row] = {}
    for r in rows:
        if r.p50_s is not None and r.backend in ("cpu", "triton", "cuda", "cupy", "torch"):
            old = found.get((r.op, r.variant))
            if old is None or r.p50_s < (old.p50_s or math.inf):
                found[r.op, r.variant] = r
    return list(found.values())


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """Logarithmic, clamped."""
    return lambda v: first + (last - first) * (math.log10(min(max(v, low), high) / low)) / math.log10(high / low)


def _decades(low: float, high: float) -> list[float]:
    return [10.0**e for e in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def _mark(shape: str, x: float, y: float, colour: str, title: str) -> str:
    drawn = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"',
        "square": f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"',
        "triangle": f'<path d="M{x:.1f} {y - 6:.1f} l6 10 h-12 z"',
        "diamond": f'<path d="M{x:.1f} {y - 6:.1f} l6 6 l-6 6 l-6 -6 z"',
    }[shape]
    tag = drawn[1 : drawn.index(" ")]
    return f'{drawn} fill="{colour}" fill-opacity=".75" stroke="{colour}"><title>{escape(title)}</title></{tag}>'


def _roofline(runs: Sequence[Run]) -> str:
    width, height, left, right, top, bottom = 1000, 460, 70, 20, 20, 50
    points = [(i, r) for i, (*_, rows) in enumerate(runs) for r in _best(rows) if r.flops and r.bytes and r.flops_per_s]
    peaks = [rows[0].ceilings for *_, rows in runs]
    ratio = [r.flops / r.bytes for _, r in points if r.flops and r.bytes]
    knees = [p["gemm"] / p["copy"] for p in peaks]
    low_x, high_x = (
        10 ** math.floor(math.log10(min([*ratio, 0.1]))),
        10 ** math.ceil(math.log10(max([*ratio, *knees]) * 2)),
    )
    rates = [r.flops_per_s / 1e9 for _, r in points if r.flops_per_s]
    low_y = 10 ** math.floor(math.log10(min([*rates, *(p["copy"] * low_x / 1e9 for p in peaks)])))
    high_y = 10 ** math.ceil(math.log10(max(p["gemm"] for p in peaks) / 1e9))
    x, y = _scale(low_x, high_x, left, width - right), _scale(low_y, high_y, height - bottom, top)
    out = [_open(width, height, "Roofline plot: Gflop/s over flops per byte; the table below holds the same numbers")]
    for v in _decades(low_x, high_x):
        out.append(f'<line class="grid" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{top}" y2="{height - bottom}"/>')
        out.append(f'<text class="soft" x="{x(v):.1f}" y="{height - bottom + 18}" text-anchor="middle">{v:g}</text>')
    for v in _decades(low_y, high_y):
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>')
        out.append(f'<text class="soft" x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v:g}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">flops per byte</text>')
    middle = (top + height - bottom) / 2
    out.append(f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">Gflop/s</text>')
    for i, (p, knee) in enumerate(zip(peaks, knees, strict=True)):
        start = (x(low_x), y(p["copy"] * low_x / 1e9))
        path = f"M{start[0]:.1f} {start[1]:.1f} L{x(knee):.1f} {y(p['gemm'] / 1e9):.1f} H{width - right}"
        out.append(f'<path d="{path}" fill="none" stroke="{COLOURS[i]}" stroke-width="2"/>')
        said = f"{runs[i][0]}: copy {p['copy'] / 1e9:.1f} GB/s, gemm {p['gemm'] / 1e9:.0f} Gflop/s"
        out.append(f'<text x="{left + 14}" y="{top + 18 + 20 * i}" style="fill:{COLOURS[i]}">{escape(said)}</text>')
    named: set[str] = set()
    placed: list[tuple[float, float]] = []
    for i, r in sorted(points, key=lambda p: -(p[1].flops_per_s or 0)):
        at_x, at_y = x((r.flops or 0) / (r.bytes or 1)), y((r.flops_per_s or 0) / 1e9)
        share = f"{100 * (r.of_ceiling or 0):.0f} % of the ceiling"
        out.append(_mark(SHAPES[i], at_x, at_y, COLOURS[i], f"{runs[i][0]}: {r.op}, {r.variant}, {r.backend}: {share}"))
        # one name for an operator, and only where it hides no other
        if r.op not in named and all(abs(at_x - a) > 130 or abs(at_y - b) > 15 for a, b in placed):
            named.add(r.op)
            placed.append((at_x, at_y))
            end = at_x > width - 160
            out.append(
                f'<text class="soft" x="{at_x + (-9 if end else 9):.1f}" y="{at_y + 4:.1f}"'
                f' text-anchor="{"end" if end else "start"}">{escape(r.op)}</text>'
            )
    return "\n".join([*out, "</svg>"])


def _open(width: int, height: int, title: str) -> str:
    return f'<svg role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-label="{escape(title)}">'


def _bars(runs: Sequence[Run]) -> str:
    best = [{(r.op, r.variant): r for r in _best(rows)} for *_, rows in runs]
    keys = list(dict.fromkeys(k for b in best for k in b))
    names = [f"{op}: {variant}" for op, variant in keys]
    names = [n if len(n) <= 50 else n[:49] + "…" for n in names]
    bar, gap, right = 16, 12, 90
    left = 20 + 7.5 * max(map(len, names), default=0)  # a letter of 13 pixels is about 7 wide
    group = bar * len(runs) + gap
    width, height = 1000, 26 + group * len(keys) + 8
    top = max([100.0, *(100 * (r.of_ceiling or 0) for b in best for r in b.values())])
    x = lambda v: left + (width - left - right) * v / top  # noqa: E731
    out = [
        _open(
            width, height, "Bars: per cent of the ceiling for every operator and run; the table below holds the times"
        )
    ]
    for v in range(0, int(top) + 1, 20):
        dark = ' style="stroke:#8b95a1;stroke-dasharray:4 3"' if v == 100 else ""
        out.append(f'<line class="grid" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="18" y2="{height - 8}"{dark}/>')
        out.append(f'<text class="soft" x="{x(v):.1f}" y="12" text-anchor="middle">{v} %</text>')
    for j, (key, shown) in enumerate(zip(keys, names, strict=True)):
        begin = 26 + group * j
        out.append(
            f'<text x="{left - 10}" y="{begin + bar * len(runs) / 2 + 4:.1f}" text-anchor="end">{escape(shown)}</text>'
        )
        for i, b in enumerate(best):
            r = b.get(key)
            if r is None or r.of_ceiling is None:
                continue
            share, at = 100 * r.of_ceiling, begin + bar * i
            title = f"{runs[i][0]}: {key[0]}: {key[1]}, {r.backend}, {1e3 * (r.p50_s or 0):.2f} ms, {share:.0f} %"
            out.append(
                f'<rect x="{left}" y="{at}" width="{x(share) - left:.1f}" height="{bar - 2}" fill="{COLOURS[i]}">'
                f"<title>{escape(title)}</title></rect>"
            )
            out.append(
                f'<text class="soft" x="{x(share) + 6:.1f}" y="{at + bar - 3}">{runs[i][0]} {share:.0f} % {r.backend}</text>'
            )
    return "\n".join([*out, "</svg>"])


def _table(runs: Sequence[Run], both: Sequence[tuple[Key, list[float | None]]]) -> str:
    times = "".join(f'<th scope="col" class="n">{label} ms</th>' for label, *_ in runs)
    against = "".join(f'<th scope="col" class="n">A / {label}</th>' for label, *_ in runs[1:])
    lines = []
    for key, values in both:
        cells = "".join(f"<td>{escape(k)}</td>" for k in key)
        cells += "".join(f'<td class="n">{"" if v is None else f"{1e3 * v:.2f}"}</td>' for v in values)
        first = values[0]
        for v in values[1:]:
            cells += f'<td class="n">{"" if v is None or first is None else f"{first / v:.2f}"}</td>'
        lines.append(f"<tr>{cells}</tr>")
    return (
        '<p class="note">Medians; a ratio above 1 means that A is slower.</p><table><thead><tr>'
        '<th scope="col">operator</th><th scope="col">variant</th><th scope="col">backend</th>'
        f"{times}{against}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )

"""Results as tables on stdout, or as JSON."""

from __future__ import annotations

import json as js
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ._terminal import gigabytes

if TYPE_CHECKING:
    from ._dispatch import Op
    from .recipe import Recipe
    from .report import Report


def _console() -> Console:
    return Console(soft_wrap=False, highlight=False)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _rows(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, escape(_text(value)))
    return table


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value) or "-"
    return str(value)


def plan(recipe: Recipe, report: Report, out: Path | None) -> None:
    """The plan of a dry run: who takes part, the parameters as they resolve, memory, disk, time."""
    console, estimate = _console(), report.estimate
    parts = {
        "method": f"{report.method}: {recipe.method.summary}",
        "base": report.base,
        "out": out,
        "device": ", ".join(f"{name} on {where}" for name, where in report.where.items()) or report.device,
        **({"why": estimate["device_why"]} if "device_why" in estimate else {}),
    }
    console.print(_rows("plan", {**parts, "stored dtype": recipe.stored_dtype or "as in the base"}))
    models = _table("model", "weight and other per-model parameters")
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in recipe.inputs]
    for name, value in report.parameters.items():
        if isinstance(value, list) and name in recipe.method.parameters and recipe.method.parameters[name].per_model:
            for row, v in zip(own, value, strict=True):
                row[name] = v
        else:
            shared[name] = value
    for ref, row in zip(recipe.inputs, own, strict=True):
        models.add_row(escape(str(ref)), escape(", ".join(f"{k} = {_text(v)}" for k, v in row.items())))
    console.print(models)
    if shared:
        console.print(_rows("parameters", shared))
    copied = sum(t.how == "copied" for t in report.tensors)
    cost: dict[str, Any] = {
        "tensors": f"{len(report.tensors) - copied} merged, {copied} copied",
        "memory": f"{gigabytes(estimate['buffer_bytes'])} of buffers, beside the program itself (~0.3 GB)",
        "disk": f"{gigabytes(estimate['bytes_out'])} written, at most {gigabytes(estimate['bytes_moved'])} read and written in all",
        "workers": report.workers,
    }
    if "vram_bytes" in estimate:
        chunk, slots = estimate["device_chunk_elements"][0], estimate["device_slots"][0]
        cost["GPU memory"] = (
            f"{', '.join(gigabytes(n) for n in estimate['vram_bytes'])}: {slots} buffers of {chunk} elements; "
            f"as much pinned host memory without the workspace ({gigabytes(sum(estimate['pinned_bytes']))})"
        )
    for path, size in report.files.items():
        cost[path] = f"about {gigabytes(size)}"
    if "seconds" in estimate:
        cost["time"] = f"at least {estimate['seconds']:.1f} s: {estimate['seconds_how']}"
    console.print(_rows("cost", cost))
    for note in report.notes:
        console.print(f"note: {note}", markup=False)


def _cosines(found: dict[str, Any]) -> None:
    """Lengths of the models' deltas and the cosines between them."""
    count = len(found["names"])
    table = _table("", "length", *(str(i + 1) for i in range(count)), title=f"cosines between the {found['of']}")
    for i, (name, length, row) in enumerate(zip(found["names"], found["lengths"], found["matrix"], strict=True)):
        table.add_row(f"{i + 1} {escape(name)}", _text(length), *("-" if c is None else f"{c:.3f}" for c in row))
    _console().print(table)


def summary(report: Report) -> None:
    """What a finished merge did, in a few lines."""
    moved = report.bytes_read + report.bytes_written
    rows = {
        "written": report.out,
        "method": report.method,
        "tensors": len(report.tensors),
        "device": report.device,
        "wall": f"{report.wall_s:.2f} s ({gigabytes(moved / max(report.wall_s, 1e-9))}/s read and written)",
        "cpu": f"{report.cpu_s:.2f} s",
        "peak memory": gigabytes(report.peak_rss),
        "read, written": f"{gigabytes(report.bytes_read)}, {gigabytes(report.bytes_written)}",
        **{path: gigabytes(size) for path, size in report.files.items()},
    }
    _console().print(_rows("merged", rows))
    if report.cosines is not None and len(report.cosines["names"]) > 1:
        _cosines(report.cosines)
    for name, count in report.nonfinite.items():
        _console().print(f"warning: {count} NaN or Inf values in {name}", markup=False)
    for note in report.notes:
        _console().print(f"note: {note}", markup=False)


def methods(name: str | None, *, json: bool) -> None:
    from .methods import REQUIRED, get, names

    chosen = [get(n) for n in ([name] if name else names())]
    if json:
        listed = [
            {
                "name": m.name, "summary": m.summary, "paper": m.paper, "base": m.base, "models": m.models,
                "parameters": [
                    {
                        "name": p.name, "type": p.type.__name__, "per_model": p.per_model, "required": p.default is REQUIRED,
                        "default": None if p.default is REQUIRED else p.default,
                        "minimum": p.minimum if math.isfinite(p.minimum) else None,
                        "maximum": p.maximum if math.isfinite(p.maximum) else None,
                        "choices": p.choices, "help": p.help,
                    }
                    for p in m.parameters.values()
                ],
            }
            for m in chosen
        ]  # fmt: skip
        print(js.dumps(listed[0] if name else listed, indent=1))
        return
    console = _console()
    if name is None:
        table = _table("method", "base", "models", "paper", "what it does")
        for m in chosen:
            table.add_row(m.name, m.base, _count(m.models), m.paper, escape(m.summary))
        console.print(table)
        console.print("\nfastmerge methods NAME shows a method's parameters.")
        return
    (m,) = chosen
    console.print(f"{m.name}  {m.paper}\n\n{m.description}\n", markup=False)
    console.print(f"base model: {m.base}; models besides it: {_count(m.models)}\n", markup=False)
    table = _table("parameter", "per", "type", "default", "range", "")
    for p in m.parameters.values():
        kind = " or ".join(p.choices) if p.choices else f"list of {p.type.__name__}" if p.many else p.type.__name__
        low = f">= {p.minimum:g}" if math.isfinite(p.minimum) else ""
        high = f"<= {p.maximum:g}" if math.isfinite(p.maximum) else ""
        default = "required" if p.default is REQUIRED else _text(p.default)
        table.add_row(
            p.name,
            "model" if p.per_model else "merge",
            kind,
            default,
            " and ".join(filter(None, (low, high))),
            escape(p.help),
        )
    console.print(table)


def _count(models: tuple[int, int | None]) -> str:
    low, high = models
    return f"{low}" if low == high else f">= {low}" if high is None else f"{low}-{high}"


def ops(name: str | None, *, json: bool) -> None:
    from . import ops as module
    from ._dispatch import Op
    from .errors import BadInput, did_you_mean

    found = {n: op for n in module.__all__ if isinstance(op := getattr(module, n), Op)}
    if name is not None and name not in found:
        raise BadInput(
            f"unknown operator {name!r}{did_you_mean(name, found)}", remedy=f"the operators are {', '.join(found)}"
        )
    chosen = {name: found[name]} if name else found
    if json:
        listed = [
            {"name": n, "numerics": op.numerics, "kind": op.kind, "backends": [*op.backends, "reference"],
             "signature": f"{n}{op.signature}", "doc": op.__doc__}
            for n, op in chosen.items()
        ]  # fmt: skip
        print(js.dumps(listed[0] if name else listed, indent=1))
        return
    console = _console()
    if name is not None:
        op = chosen[name]
        console.print(f"{name}{op.signature}\n\n{op.__doc__}\n", markup=False)
        console.print(f"numerics class {op.numerics}; backends: {', '.join([*op.backends, 'reference'])}", markup=False)
        console.print(f"\nHere, for the inputs {op.cases[0].name!r}:\n{_explained(op)}", markup=False)
        return
    table = _table("operator", "numerics", "kind", "backends, by preference", "what it does")
    for n, op in chosen.items():
        what = (op.__doc__ or "").partition("\n")[0]
        table.add_row(n, op.numerics, op.kind, ", ".join([*op.backends, "reference"]), escape(what))
    console.print(table)
    console.print("\nNumerics: A same bits on every backend, B same bits on one build, C within a tolerance.")


def _explained(op: Op[..., Any]) -> str:
    """Which backend would run the operator's first case on this machine, and what keeps each other one from it."""
    import torch

    case = op.cases[0]
    args, kwargs = case.make(torch.Generator().manual_seed(0), case.dtypes[0])
    return str(op.explain(*args, **kwargs))


def doctor(found: dict[str, Any], *, json: bool) -> None:
    if json:
        print(js.dumps(found, indent=1))
        return
    console = _console()
    cpu, memory, native, torch, gpu = (found[k] for k in ("cpu", "memory", "native", "torch", "gpu"))
    rows: dict[str, Any] = {
        "fastmerge": f"{found['fastmerge']} on Python {found['python']}, {found['platform']}",
        "cpu": f"{cpu['model']}, {cpu['usable_cpus']} of {cpu['logical_cpus']} CPUs usable",
        "cpu features": cpu["features"],
        "memory": f"{gigabytes(memory['available_bytes'] or 0)} free of {gigabytes(memory['total_bytes'] or 0)}, "
        f"huge pages: {memory['transparent_huge_pages'] or 'unknown'}",
        "native kernels": f"{native['simd']}, {native['threads']} threads, gcc {native['compiler']}"
        if native["loaded"]
        else native["why_not"],
        "cuda kernels": (native.get("cuda") or native.get("cuda_why_not")) if native["loaded"] else "no native module",
        "torch": f"{torch['version']}, {torch['threads']} threads",
        "gpu": "; ".join(
            f"{d['name']} ({gigabytes(d['memory_bytes'])}, {d['compute_capability']})" for d in gpu["devices"]
        )
        or gpu["why_not"],
        "gpu driver": gpu["driver"],
        "merge --device": ", ".join(found["engine"]["devices"])
        + (f" (no cuda: {found['engine']['why_not_cuda']})" if found["engine"]["why_not_cuda"] else ""),
        **found["toolchain"],
        "openmp runtimes": found["openmp_runtimes"],
        "FASTMERGE_BACKEND": found["backend_requested"],
    }
    if gpu["devices"] and gpu["why_not"]:
        rows["gpu unused"] = gpu["why_not"]
    console.print(_rows("doctor", rows))
    table = _table("operator", "numerics", "on CPU tensors", "on GPU tensors", "why not the others")
    for name, op in found["ops"].items():
        reasons = dict(op.get("cpu_why_not", {}))
        if gpu["devices"]:
            reasons |= {f"GPU, {who}": why for who, why in op["cuda_why_not"].items()}
        said = "; ".join(f"{who}: {why}" for who, why in reasons.items())
        table.add_row(name, op["numerics"], _text(op.get("cpu")), _text(op.get("cuda")), escape(said))
    console.print(table)
    for advice in found["advice"]:
        console.print(f"advice: {advice}", markup=False)

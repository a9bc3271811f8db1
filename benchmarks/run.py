"""Runs the suite: ceilings, then per operator the correctness gate and the table.

``python -m fastmerge.benchmarks.run [OP ...] [--full] [--save rows.jsonl]`` (also ``fastmerge bench``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastmerge import ops
from fastmerge._dispatch import REFERENCE, Op

from . import ops as declarations
from .declare import Bench, Variant
from .timing import Times, ceilings, environment, side_by_side

SCHEMA = 1


def names() -> list[str]:
    """Operators that have a declaration."""
    return sorted(m.name for m in pkgutil.iter_modules(declarations.__path__))


def load(name: str) -> Bench:
    bench: Bench = importlib.import_module(f"{declarations.__name__}.{name}").BENCH
    return bench


def gate(op: Op[..., Any], device: torch.device) -> list[str]:
    """The operator's cases on every backend that can run them; what disagrees with the reference, in sentences."""
    wrong = []
    for case in op.cases:
        for dtype in case.dtypes:
            made = [case.make(torch.Generator().manual_seed(0), dtype) for _ in range(2)]
            (args, kwargs), (again, more) = ((_to(a, device), _to(k, device)) for a, k in made)
            want = op(*args, backend=REFERENCE, **kwargs)
            for name in op.backends:
                if op.why_not(name, *again, **more) is None:
                    got = op(*_clone(again), backend=name, **_clone(more))
                    if not _agree(got, want, op):
                        wrong.append(f"{op.name} [{name}] {case.name}, {dtype}")
    return wrong


def _to(value: Any, device: torch.device) -> Any:
    return _map(value, lambda t: t.to(device))


def _clone(value: Any) -> Any:
    return _map(value, lambda t: t.clone())


def _map(value: Any, f: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return f(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_map(v, f) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, f) for k, v in value.items()}
    return value


def _agree(got: Any, want: Any, op: Op[..., Any]) -> bool:
    if isinstance(want, torch.Tensor):
        if got.shape != want.shape or got.dtype != want.dtype:
            return False
        if op.numerics == "A" or not want.is_floating_point():
            return bool(torch.equal(torch.nan_to_num(got), torch.nan_to_num(want)))
        scale = float(want.double().square().mean().sqrt()) if want.numel() else 0.0
        error = float((got.double() - want.double()).square().mean().sqrt()) if want.numel() else 0.0
        return (
            error <= 1e-2 * (scale or 1.0)
            if want.dtype in (torch.bfloat16, torch.float16)
            else error <= 1e-4 * (scale or 1.0)
        )
    if isinstance(want, (list, tuple)):
        return len(got) == len(want) and all(_agree(g, w, op) for g, w in zip(got, want, strict=True))
    return bool(got == want)


def measure(
    bench: Bench, variant: Variant, device: torch.device, limits: dict[str, float], budget: float
) -> Iterator[dict[str, Any]]:
    """Rows of one variant: every backend that can run it, the reference, the rivals; skipped ones with the reason."""
    op: Op[..., Any] = getattr(ops, bench.op)
    args, kwargs = variant.make(device)
    calls: dict[str, Callable[[], Any]] = {}
    reasons: dict[str, str] = {}
    for name in [*op.backends, REFERENCE]:
        reason = op.why_not(name, *args, **kwargs)
        if reason is None:
            calls[name] = lambda name=name: op(*args, backend=name, **kwargs)
        else:
            reasons[name] = reason
    for name, rival in bench.rivals.items():
        calls[name] = lambda rival=rival: rival(*args, **kwargs)
    reset = None if bench.setup is None else (lambda: bench.setup(args))  # type: ignore[misc]
    times = side_by_side(calls, device, budget=budget, reset=reset)
    for name in calls:
        yield _row(bench, variant, name, times[name], times[REFERENCE], limits)
    for name, reason in reasons.items():
        yield {"op": bench.op, "variant": variant.name, "backend": name, "skipped": reason}


def _row(
    bench: Bench, variant: Variant, name: str, t: Times, reference: Times, limits: dict[str, float]
) -> dict[str, Any]:
    rate = variant.bytes / t.p50
    return {
        "op": bench.op, "variant": variant.name, "backend": name, "p20_s": t.p20, "p50_s": t.p50, "p80_s": t.p80, "calls": t.calls,
        "bytes": variant.bytes, "flops": variant.flops, "bytes_per_s": rate, "of_copy": rate / limits["copy"],
        "flops_per_s": variant.flops / t.p50, "speedup": reference.p50 / t.p50,
    }  # fmt: skip


def table(rows: Iterable[dict[str, Any]], title: str) -> Table:
    out = Table(title=title, title_justify="left")
    for heading in ("variant", "backend", "p20 ms", "p50 ms", "p80 ms", "GB/s", "% of copy", "x reference"):
        out.add_column(heading, justify="left" if heading in ("variant", "backend") else "right")
    for r in rows:
        if "skipped" not in r:
            ms = [f"{r[k] * 1e3:.2f}" for k in ("p20_s", "p50_s", "p80_s")]
            out.add_row(
                r["variant"],
                r["backend"],
                *ms,
                f"{r['bytes_per_s'] / 1e9:.1f}",
                f"{100 * r['of_copy']:.0f}",
                f"{r['speedup']:.1f}",
            )
    return out


def run(
    chosen: Sequence[str] = (),
    *,
    full: bool = False,
    device: str = "cpu",
    budget: float = 1.0,
    save: Path | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Measure and print; returns the rows. Raises SystemExit(1) after naming what failed when a gate is red."""
    console = console or Console()
    unknown = set(chosen) - set(names())
    if unknown:
        raise SystemExit(f"no benchmark for {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    where = torch.device(device)
    benches = [load(n) for n in chosen or names()]
    wrong = [w for b in benches for w in gate(getattr(ops, b.op), where)]
    if wrong:
        console.print("not timed: these disagree with the reference", *wrong, sep="\n  ")
        raise SystemExit(1)
    limits, env = ceilings(where), environment(where)
    console.print(f"{env['device']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}")
    console.print(
        "ceilings: "
        + ", ".join(
            f"{k} {v / 1e9:.1f} {'GB/s' if k in ('copy', 'read', 'triad') else 'Gflop/s'}" for k, v in limits.items()
        )
    )
    rows = []
    for bench in benches:
        mine = [r for v in bench.variants if full or v.quick for r in measure(bench, v, where, limits, budget)]
        console.print(table(mine, bench.op))
        for name, reason in {r["backend"]: r["skipped"] for r in mine if "skipped" in r}.items():
            console.print(f"  {name} not run: {reason}", highlight=False)
        rows += [{"schema": SCHEMA, **r, "ceilings": limits, **env} for r in mine]
    if save is not None:
        with save.open("a") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--full", action="store_true", help="all sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per call and variant")
    parser.add_argument("--save", type=Path, help="append rows to this JSONL file")
    given = parser.parse_args()
    run(given.ops, full=given.full, device=given.device, budget=given.budget, save=given.save)


if __name__ == "__main__":
    main()

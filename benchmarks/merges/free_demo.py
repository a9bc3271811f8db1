"""FREE on the demo's networks: what experts and router recover, and every rule for mu beside a grid of constants.

python -m fastmerge.benchmarks.merges.free_demo [--quick] [--density 0.01]

The gap is that between FR, its parameters chosen on calibration images, and the individual fine-tunes. For every mu the
backbone's lambda is chosen anew on calibration images, of 0.5, 1 and 1.5; accuracies are those on test images.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import fastmerge as fm
from fastmerge.demo import DemoFamily, prepare
from fastmerge.demo.free import DENSITIES, free_rows, oracle
from fastmerge.demo.rows import FULL, QUICK, Budget, Merger, mean, plain_rows
from fastmerge.experts import FreeModel, extract

CONSTANTS = {0.01: (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0), 0.1: (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)}
CHOOSING = 100  # calibration images of each task that choose lambda
PERCENT = 2  # digits


def recovered(family: DemoFamily, budget: Budget) -> dict[str, Any]:
    """The demo's rows, and the share of the gap that each of FREE's closes."""
    with tempfile.TemporaryDirectory() as folder:
        merger = Merger(family, budget)
        rows = [merger.row(name, Path(folder) / name) for name in ("task_arithmetic", "fr")]
        rows += free_rows(family, Path(folder) / "free", budget)
    own = plain_rows(family, budget.test)[-1].mean
    by_name = {r.name: r for r in rows if not isinstance(r, str)}
    fr = by_name["fr"].mean
    out: dict[str, Any] = {"individual": round(100 * own, PERCENT)}
    for name, row in by_name.items():
        out[name] = {"mean accuracy, %": round(100 * row.mean, PERCENT), "parameters": row.parameters}
        if row.kind == "routed":
            out[name]["recovers of the gap, %"] = round(100 * (row.mean - fr) / (own - fr), 1)
            out[name] |= {"bytes of an expert": row.expert_bytes, "swap ms": round(1e3 * (row.swap_seconds or 0), 2)}
    return out


def strengths(family: DemoFamily, budget: Budget, density: float) -> dict[str, Any]:
    """Test accuracy by rule and by constant."""
    tasks = list(family.tasks)
    base, states = family.state(), [family.state(t) for t in tasks]
    backbones = {v: family.model(fm.merge("fr", base, states, lambda_=v)) for v in (0.5, 1.0, 1.5)}
    rules: dict[str, dict[str, Any]] = {name: {"mu": name} for name in ("paper", "vit", "balanced")}
    rules |= {f"{c:g}": {"mu": "constant", "constant": c} for c in CONSTANTS[density]}
    out: dict[str, Any] = {}
    for name, rule in rules.items():
        found: dict[float, tuple[float, FreeModel, list[float]]] = {}
        for value, model in backbones.items():
            more = {"lambda_": value} if name == "paper" else {}  # the paper's mu divides by the coefficient
            made = extract(base, states, tasks=tasks, density=density, by="tensor", **rule, **more)
            free = FreeModel(model, made)
            score = mean(oracle(family, free, "calibration", CHOOSING))
            free.use(None)
            found[value] = score, free, [max(t.mu for t in e.tensors.values()) for e in made]
        best = max(found, key=lambda v: found[v][0])
        score, free, values = found[best]
        out[name] = {
            "mu": [round(v, 2) for v in values] if rule["mu"] != "constant" else values[0],
            "lambda": best,
            "calibration, %": round(100 * score, PERCENT),
            "test, %": round(100 * mean(oracle(family, free, "test", budget.test)), PERCENT),
        }
        free.use(None)
        print(name, out[name], file=sys.stderr, flush=True)
    grid = [v["test, %"] for k, v in out.items() if k not in ("paper", "vit", "balanced")]
    for name in ("paper", "vit", "balanced"):
        out[name]["below the best of the grid, points"] = round(max(grid) - out[name]["test, %"], PERCENT)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smaller network")
    parser.add_argument(
        "--density", type=float, choices=(0.0, *DENSITIES), help="only mu at this density; 0: only rows"
    )
    arguments = parser.parse_args()
    family, budget = prepare(quick=arguments.quick), QUICK if arguments.quick else FULL
    report: dict[str, Any] = {}
    if not arguments.density:
        report["rows"] = recovered(family, budget)
    for density in DENSITIES if arguments.density is None else filter(None, [arguments.density]):
        report[f"mu at density {density:g}"] = strengths(family, budget, density)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

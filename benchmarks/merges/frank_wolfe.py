"""Frank-Wolfe against the machine and against the published procedure, side by side in one run.

    python -m fastmerge.benchmarks.merges.frank_wolfe oracle FOLDER...     # one pass over the candidates in FOLDERs
    python -m fastmerge.benchmarks.merges.frank_wolfe run                  # 10 iterations, 20 candidates, the demo's model
    python -m fastmerge.benchmarks.merges.frank_wolfe scale                # accuracy with 16 irrelevant candidates
    python -m fastmerge.benchmarks.merges.frank_wolfe memory               # peak memory with 2, 8 and 64 candidates

oracle: ours; one thread reading the same files in 4 MB blocks and doing nothing with them; and the published loop,
which takes each tensor of each candidate whole, flattens it and computes one dot and two norms.
run: the published procedure keeps every candidate in memory, adds up gradients of single images, and loops over
tensors; both are asked for the same choices. scale: what the papers call stability.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmerge as fm
from fastmerge.fw.problem import opened_problem

State = Mapping[str, Tensor]
BLOCK = 4 << 20


def seconds(f: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = f()
    return time.perf_counter() - begin, result


def read_all(folders: Sequence[Path]) -> int:
    """Every byte of the candidates' files, by one thread, into one buffer."""
    buffer, total = memoryview(bytearray(BLOCK)), 0
    for file in [f for folder in folders for f in sorted(folder.glob("*.safetensors"))]:
        fd, at = os.open(file, os.O_RDONLY), 0
        while n := os.preadv(fd, [buffer], at):
            at += n
        os.close(fd)
        total += at
    return total


def published_oracle(gradients: State, candidates: Sequence[State]) -> tuple[list[int], list[float]]:
    """The released loop: a candidate's tensors one by one; norms of gradient and candidate anew every time."""
    picks, scores = [], []
    for name, g in gradients.items():
        best, pick = float("inf"), -1
        flat = g.flatten()
        for k, candidate in enumerate(candidates):
            x = candidate[name].float().flatten()
            value = float(torch.dot(flat, x) / (torch.norm(flat) * torch.norm(x)))
            if value < best:
                best, pick = value, k
        picks.append(pick)
        scores.append(best)
    return picks, scores


class Lazy(Mapping[str, Tensor]):
    """Tensors of a folder, mapped from its files when they are asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.files = [safe_open(f, "pt") for f in sorted(folder.glob("*.safetensors"))]
        self.where = {n: f for f in self.files for n in f.keys()}  # noqa: SIM118  (a file is not a mapping)

    def __getitem__(self, name: str) -> Tensor:
        return self.where[name].get_tensor(name)

    def __iter__(self) -> Any:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def oracle(folders: Sequence[Path], repeat: int, published: bool) -> dict[str, Any]:
    times: dict[str, list[float]] = {"read": [], "dot": [], "cosine": [], "published": []}
    gigabytes = read_all(folders) / 1e9
    with opened_problem(
        folders[0], folders[1:], select=None, exclude=None, missing="error", space=None, lora="product", device=None,
        shards=None, group=None, allow_pickle=False,
    ) as problem:  # fmt: skip
        g = torch.Generator().manual_seed(0)
        gradients = {n: torch.empty(problem.parts[n].numel).normal_(generator=g) for n in problem.names}
        problem.theta = gradients  # any point of the right size: its products are computed too
        count = len(folders) - 1
        got = None
        for i in range(repeat):
            times["read"].append(seconds(lambda: read_all(folders[1:]))[0])
            took, got = seconds(lambda: problem.pool.products(gradients, problem.theta, norms=[False] * count))
            times["dot"].append(took)
            times["cosine"].append(
                seconds(lambda: problem.pool.products(gradients, problem.theta, norms=[True] * count))[0]
            )
            if published and i == 0:
                lazy = [Lazy(f) for f in folders[1:]]
                times["published"].append(seconds(lambda lazy=lazy: published_oracle(gradients, lazy))[0])
    assert got is not None
    middle = {k: statistics.median(v) for k, v in times.items() if v}
    out = {"candidates": count, "gb": gigabytes, "seconds": middle, "dot_over_read": middle["dot"] / middle["read"]}
    out["cosine_over_read"] = middle["cosine"] / middle["read"]
    out["best_dot_over_best_read"] = min(times["dot"]) / min(times["read"])  # what a busy machine disturbs least
    if published:
        out["published_over_cosine"] = middle["published"] / middle["cosine"]
    return out


def family_with(irrelevant: int, quick: bool, harsh: bool = True) -> tuple[Any, list[str], list[State], list[State]]:
    """The demo's family, four of its tasks, their fine-tunes, and candidates that have nothing to do with them.

    Irrelevant are the other tasks' fine-tunes; of the rest (harsh: every other one of the rest) each is a fine-tune whose
    deltas were shuffled within each tensor: meaningless, but near the base, and twice as long (harsh: four times, as
    those of a longer training are). Harsh: the others are networks of fresh random weights.
    """
    from fastmerge import demo

    family = demo.prepare(quick=quick)
    tasks, others = list(family.tasks)[:4], list(family.tasks)[4:]
    base = family.state()
    extra: list[State] = [family.state(t) for t in others]
    g = torch.Generator().manual_seed(0)
    while len(extra) < irrelevant:
        if harsh and len(extra) % 2:
            fresh = family.model()
            fresh.initialize(g)
            extra.append({n: t.detach().to(base[n].dtype) for n, t in fresh.state_dict().items()})
            continue
        source, length = family.state(tasks[len(extra) % 4]), 4 if harsh else 2
        extra.append(
            {
                n: (b + length * (source[n] - b).flatten()[torch.randperm(b.numel(), generator=g)].view(b.shape)).to(
                    b.dtype
                )
                for n, b in base.items()
            }
        )
    return family, tasks, [family.state(t) for t in tasks], extra[:irrelevant]


def published_run(
    base: State, candidates: Sequence[State], sample_gradient: Callable[[State], State], iterations: int, scale: float
) -> list[list[int]]:
    """The released procedure: start and pool, one cosine per tensor and candidate, zero where none is negative."""
    theta = {n: b.float() + scale * sum(c[n].float() - b.float() for c in candidates) for n, b in base.items()}
    pool = [*candidates, {n: t.clone() for n, t in theta.items()}]
    choices = []
    for t in range(iterations):
        found = sample_gradient(theta)
        picks, scores = published_oracle({n: found[n] for n in theta}, pool)
        gamma = 2 / (t + 2) * 0.1
        picks = [-1 if s >= 0 else k for k, s in zip(picks, scores, strict=True)]
        for name, k in zip(theta, picks, strict=True):
            s = torch.zeros_like(theta[name]) if k < 0 else pool[k][name].float()
            theta[name] = theta[name] + scale * gamma * (s - theta[name])
        choices.append(picks)
    return choices


def end_to_end(quick: bool) -> dict[str, Any]:
    family, tasks, relevant, extra = family_with(16, quick)
    base, candidates = family.state(), [*relevant, *extra]
    model = family.model()
    batched = fm.gradient(
        model, family.loss, {t: family.calibration(t, batch=25, limit=100) for t in tasks},
        workers=torch.get_num_threads(),
    )  # fmt: skip
    single = fm.gradient(
        model, family.loss, {t: family.calibration(t, batch=1, limit=100) for t in tasks}, reduction="sum"
    )
    ours, result = seconds(lambda: fm.frank_wolfe(base, candidates, batched, preset="published", norm_cache=False))
    theirs, choices = seconds(lambda: published_run(base, candidates, single, 10, 0.29))
    same = sum(a == b for x, y in zip(result.choices, choices, strict=True) for a, b in zip(x, y, strict=True))
    spent = {k: sum(i.seconds[k] for i in result.trace.iterations) for k in result.trace.iterations[0].seconds}
    return {
        "seconds": ours, "published_seconds": theirs, "ratio": theirs / ours, "same_choices": same,
        "choices": sum(map(len, choices)), "where": spent,
    }  # fmt: skip


def scale(quick: bool) -> dict[str, Any]:
    """Mean test accuracy of four tasks with their fine-tunes alone, and with 16 irrelevant candidates beside them."""
    family, tasks, relevant, harsh = family_with(16, quick)
    base = family.state()
    ask = fm.gradient(
        family.model(), family.loss, {t: family.calibration(t) for t in tasks}, workers=torch.get_num_threads()
    )

    def accuracy(state: State, split: str = "test") -> float:
        found = family.evaluate(state, split, tasks=tasks, limit=100 if split == "calibration" else None)
        return 100 * sum(found.values()) / len(found)

    searched = {"init": "base", "step": "line_search", "search_evaluations": 6, "iterations": 6}
    hard: dict[str, dict[str, Any]] = {
        "frank_wolfe robust": {"preset": "robust"},
        "frank_wolfe slope, line search": {"metric": "slope", **searched},
        "frank_wolfe dot, line search": searched,
    }
    soft: dict[str, dict[str, Any]] = {
        "frank_wolfe_soft robust": {"preset": "robust"},
        "frank_wolfe_soft dot, capped": {"constraint": "capped", "iterations": 3, "inner_steps": 5},
    }
    rows: dict[str, Any] = {"base": accuracy(base)}
    pools = {
        "4": relevant,
        "4 + 16 near": [*relevant, *family_with(16, quick, harsh=False)[3]],
        "4 + 16 harsh": [*relevant, *harsh],
    }
    for name, pool in pools.items():
        sums = {x: fm.merge("task_arithmetic", base, pool, weight=1.0, lambda_=x) for x in (0.05, 0.1, 0.29)}
        rows[f"task_arithmetic 0.29, {name}"] = accuracy(sums[0.29])
        scores = {x: accuracy(state, "calibration") for x, state in sums.items()}
        best = max(scores, key=lambda x: scores[x])
        rows[f"task_arithmetic chosen, {name}"] = accuracy(sums[best])
        for methods, run in ((hard, fm.frank_wolfe), (soft, fm.frank_wolfe_soft)):
            for method, options in methods.items():
                took, result = seconds(lambda: run(base, pool, ask, norm_cache=False, **options))  # noqa: B023
                rows[f"{method}, {name}"] = accuracy(result.state_dict)
                rows[f"{method}, {name}, seconds"] = round(took, 1)
    return rows


CHILD = """
import sys, torch
import fastmerge as fm
class Quadratic:
    def __call__(self, state):
        self.value = float(sum(t.square().sum() for t in state.values())) / 2
        return dict(state)
fm.frank_wolfe(sys.argv[1], sys.argv[2:], Quadratic(), metric="cosine", iterations=2, norm_cache=False)
fm.frank_wolfe_soft(sys.argv[1], sys.argv[2:], Quadratic(), top_k=2, inner_steps=2, iterations=2, norm_cache=False)
"""


def memory(elements: int = 2 << 20) -> dict[str, float]:
    """Peak resident MB of a process that merges 2, 8 and 64 candidates of `elements` bf16 weights, by wait4."""
    import subprocess
    import sys
    import tempfile

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as root:
        g = torch.Generator().manual_seed(0)
        for k in range(65):
            (Path(root) / str(k)).mkdir()
            tensors = {n: torch.randn(elements // 4, generator=g).bfloat16() for n in "wxyz"}
            save_file(tensors, Path(root) / str(k) / "model.safetensors")
        peaks = {}
        for count in (2, 8, 64):
            folders = [f"{root}/{k}" for k in range(count + 1)]
            process = subprocess.Popen([sys.executable, "-c", CHILD, *folders])
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise RuntimeError(f"the run with {count} candidates failed")
            peaks[f"{count} candidates"] = usage.ru_maxrss / 1024
    return {**peaks, "64 over 2": peaks["64 candidates"] / peaks["2 candidates"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["oracle", "run", "scale", "memory"])
    parser.add_argument("folders", nargs="*", type=Path, help="oracle: the base's folder, then the candidates'")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--published", action="store_true", help="oracle: time the published loop too")
    parser.add_argument("--quick", action="store_true", help="run, scale: the demo's small family")
    given = parser.parse_args()
    if given.what == "oracle":
        print(json.dumps(oracle(given.folders, given.repeat, given.published)))
    elif given.what == "memory":
        print(json.dumps(memory()))
    else:
        print(json.dumps(end_to_end(given.quick) if given.what == "run" else scale(given.quick)))


if __name__ == "__main__":
    main()

"""Soft Frank-Wolfe merging: several vertices per iteration, their coefficients optimised on the calibration loss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import BadInput, check_choice
from ..ops import fw_products, weighted_sum
from . import presets
from .choice import Products, choose
from .coefficients import Objective, Spectral, minimise
from .hard import METRICS, GradientFunction, Norms, Progress, ask, duplicates, measure
from .problem import Problem, State, open_start, opened_problem
from .result import Coefficients, FrankWolfeResult
from .trace import Iteration, Trace

Picks = dict[str, list[int]]


@presets.with_presets(presets.SOFT)
def frank_wolfe_soft(
    base: Any,
    candidates: Iterable[Any],
    gradient: GradientFunction,
    *,
    iterations: int = 15,
    top_k: int = 4,
    constraint: Literal["simplex", "capped", "none"] = "simplex",
    optimizer: Literal["pgd", "adam"] = "pgd",
    inner_steps: int = 20,
    inner_lr: float | None = None,
    start: float | tuple[float, float] | None = None,
    per: Literal["layer", "model"] = "layer",
    selection: Literal["score", "tasks"] = "score",
    granularity: Literal["layer", "model"] = "layer",
    metric: Literal["dot", "cosine", "slope"] = "dot",
    init: Any = "base",
    scale: float = 0.29,
    preset: str | None = None,
    inner_gradient: GradientFunction | None = None,
    gap_tolerance: float | None = None,
    select: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    space: Literal["weights", "deltas"] | None = None,
    missing: Literal["error", "zero"] = "error",
    lora: Literal["product", "factors"] = "product",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    norm_cache: str | Path | bool = True,
    trace: str | Path | None = None,
    progress: Progress | None = None,
    shards: Mapping[str, tuple[int, int]] | None = None,
    group: Any = None,
    allow_pickle: bool = False,
) -> FrankWolfeResult:
    """Merge by soft Frank-Wolfe: per iteration the `top_k` best vertices with optimised coefficients.

    θ_{t+1} = θ_t + Σ_j w_j (s_j − θ_t), where s_1..s_k have the lowest scores ⟨∇ℓ(θ_t), s⟩ and w minimises ℓ of the
    right-hand side. The gradient of a coefficient is an inner product, ∂ℓ/∂w_j = ⟨∇ℓ, s_j − θ_t⟩ per tensor: no autograd
    graph over candidates is ever built.

    Args (the others as in :func:`frank_wolfe`):
        top_k: vertices per iteration (with selection "tasks": at most this many, one per task).
        constraint: "simplex" (w >= 0, Σ w = 1: θ_{t+1} is a mixture of the chosen vertices alone, the paper's form),
            "capped" (w >= 0, Σ w <= 1: what is left stays at θ_t, so the loss can not rise) or "none" (published).
        optimizer: "pgd", projected gradient descent, or "adam" (betas 0.9, 0.999; projected after each step when there
            is a constraint).
        inner_lr: a fixed learning rate; None (pgd only) takes spectral steps scaled by ‖s_j − θ‖², so that vertices
            near and far share one step size, and backtracks: the loss never rises between steps.
        inner_steps: evaluations of the coefficients per iteration; 0 keeps the starting coefficients.
        start: coefficients to start from (a pair: in the first iteration, later); default 1/k, or 0 when not "simplex".
        per: one coefficient per tensor and vertex, or per vertex.
        selection: "score", or "tasks": the best vertex for each task's own gradient, none twice (published; the
            gradient then has ``tasks`` and ``task(name)``, as from ``fm.gradient`` with one data set per task).
        init: "base", "merge" (task arithmetic of all candidates with `scale`), or a checkpoint or state_dict.
        inner_gradient: the objective of the coefficients when it is another one (published: entropy of unlabelled data).
        preset: "robust" (slope, capped, few evaluations: for pools of unknown use), "published" = "fusion_bench";
            explicit arguments win over it.

    Memory: as hard, and the chosen vertices in their own dtypes and one trial point: independent of the number of
        candidates.
    Cost: per iteration one read of every candidate and 1 + `inner_steps` gradients; one less where the coefficients
        start at 0, whose gradient the selection has computed.
    Raises: BadInput, as hard.
    Source: FW-Merging (arXiv:2503.12649), soft variant.
    """
    check(
        iterations,
        top_k,
        constraint,
        optimizer,
        inner_steps,
        inner_lr,
        per,
        selection,
        granularity,
        metric,
        scale,
        gradient,
    )
    loss_known = inner_gradient or gradient
    with opened_problem(
        base, candidates, select=select, exclude=exclude, missing=missing, space=space, lora=lora,
        device=device, shards=shards, group=group, allow_pickle=allow_pickle,
    ) as problem:  # fmt: skip
        open_start(problem, init, lambda: problem.start_from_sum(scale), allow_pickle)
        record = Trace(
            {
                "method": "frank_wolfe_soft", "preset": preset, "iterations": iterations, "top_k": top_k,
                "constraint": constraint, "optimizer": optimizer, "inner_steps": inner_steps, "inner_lr": inner_lr,
                "start": start, "per": per, "selection": selection, "granularity": granularity, "metric": metric,
                "init": init if isinstance(init, str) else "given", "scale": scale, "space": problem.space, "base": problem.base.label,
            },
            problem.pool.labels,
            problem.names if granularity == "layer" else ["model"],
        )  # fmt: skip
        weights = Coefficients(problem.names, len(problem.pool.candidates), False)
        norms = Norms(problem, norm_cache) if metric == "cosine" else None
        spectral = Spectral()
        for t in range(iterations):
            clock = time.perf_counter()
            picks, here, products = _select(problem, gradient, norms, selection, granularity, metric, top_k, t)
            if t == 0:
                record.duplicates = duplicates(problem, products)
            chosen = time.perf_counter()
            record.iterations.append(here)
            done = "" if bool(products.gradient.any()) else "the gradient is zero"
            if not done and gap_tolerance is not None and here.gap <= gap_tolerance:
                done = f"the gap is at most {gap_tolerance:g}"
            if not done:
                count = len(next(iter(picks.values())))
                first = _start(start, constraint, count, t)
                columns = len(picks) if per == "layer" else 1
                w = torch.full((count, columns), first, dtype=torch.float64, device="cpu")
                objective = _Trial(problem, picks, loss_known, per)
                known = None
                if first == 0 and selection == "score" and loss_known is gradient:
                    known = here.loss, objective.slopes(products)
                w, here.inner_losses = minimise(
                    objective, w, steps=inner_steps, optimizer=optimizer, lr=inner_lr, constraint=constraint,
                    squares=objective.squares() if optimizer == "pgd" and inner_lr is None else torch.ones_like(w),
                    spectral=spectral, known=known,
                )  # fmt: skip
                objective.move(w)
                full = w.expand(count, len(picks))
                for i, (name, ks) in enumerate(picks.items()):
                    mixed: dict[int, float] = {}
                    for k, c in zip(ks, full[:, i].tolist(), strict=True):
                        mixed[k] = mixed.get(k, 0.0) + c
                    weights.move(name, mixed)
                here.coefficients = [column.tolist() for column in w.T]
                here.gamma = here.coefficient = float(w.sum(0).mean())
            here.seconds = {"select": chosen - clock, "coefficients": time.perf_counter() - chosen}
            record.stopped = done or ("all iterations done" if t + 1 == iterations else "")
            if trace is not None:
                record.save(trace)
            if progress is not None:
                progress(t + 1, iterations, here)
            if done:
                break
        return FrankWolfeResult(problem.finish(dtype), record, weights.rows)


def check(
    iterations: int, top_k: int, constraint: str, optimizer: str, inner_steps: int, inner_lr: float | None, per: str,
    selection: str, granularity: str, metric: str, scale: float, gradient: Any = None,
) -> None:  # fmt: skip
    """Raises BadInput for a setting that means nothing; without a gradient what depends on it is not looked at."""
    for what, value, known in (
        ("constraint", constraint, ("simplex", "capped", "none")),
        ("optimizer", optimizer, ("pgd", "adam")),
        ("per", per, ("layer", "model")),
        ("selection", selection, ("score", "tasks")),
        ("granularity", granularity, ("layer", "model")),
        ("metric", metric, METRICS),
    ):
        check_choice(what, value, known)
    for what, number, least, remedy in (
        ("iterations", iterations, 0, "give the number of steps; 0 returns the start"),
        ("top_k", top_k, 1, "give how many vertices a step may mix, 1 for the best alone"),
        ("inner_steps", inner_steps, 0, "give how often a step evaluates its coefficients; 0 keeps the first ones"),
    ):
        if number < least:
            raise BadInput(f"{what} must be at least {least}, not {number}", remedy=remedy)
    if not (math.isfinite(scale) and scale >= 0):
        raise BadInput(
            f"scale must be a finite number >= 0, not {scale}", remedy="leave it out: the default, 0.29, is the paper's"
        )
    if inner_lr is not None and not (math.isfinite(inner_lr) and inner_lr > 0):
        raise BadInput(
            f"inner_lr must be positive, not {inner_lr}",
            remedy="leave it out with optimizer='pgd', which finds its steps; the published value for 'adam' is 1e-3",
        )
    if optimizer == "adam" and inner_lr is None:
        raise BadInput("optimizer='adam' needs inner_lr", remedy="the published value is 1e-3")
    if (
        gradient is not None
        and selection == "tasks"
        and not (getattr(gradient, "tasks", None) and hasattr(gradient, "task"))
    ):
        raise BadInput(
            "selection='tasks' needs one gradient per task",
            remedy="make it with fm.gradient(model, loss, {task: batches, ...}), or use selection='score'",
        )


def _start(start: float | tuple[float, float] | None, constraint: str, count: int, t: int) -> float:
    if start is None:
        return 1.0 / count if constraint == "simplex" else 0.0
    if isinstance(start, (int, float)):
        return float(start)
    return float(start[0] if t == 0 else start[1])


def _select(
    problem: Problem, gradient: GradientFunction, norms: Norms | None, selection: str, granularity: str, metric: str,
    top_k: int, t: int,
) -> tuple[Picks, Iteration, Products]:  # fmt: skip
    """The vertices of this iteration per tensor, its trace row, and the (last) products."""
    limit = min(top_k, len(problem.pool.candidates))
    columns: list[list[int]] = []
    scores: list[list[float]] = []
    values: list[float] = []
    gap, margins, products = 0.0, [0.0], None
    for one in [gradient.task(n) for n in gradient.tasks] if selection == "tasks" else [gradient]:  # type: ignore[attr-defined]
        found, value = ask(problem, one)
        products = measure(problem, found, norms, relative=metric == "slope")
        del found
        choice = choose(products, metric=metric, granularity=granularity, zero_if_ascent=False)
        table = choice.table
        gap += choice.gap
        if value is not None:
            values.append(value)
        order = table.argsort(dim=0, stable=True)
        if not columns:
            columns, scores = [[] for _ in range(table.shape[1])], [[] for _ in range(table.shape[1])]
            margins = choice.margins
        if len(columns) != table.shape[1]:
            raise BadInput("the tasks' gradients hold different tensors", remedy="differentiate the same parameters")
        wanted = limit if selection == "score" else 1
        for i in range(table.shape[1]):
            fresh = [k for k in order[:, i].tolist() if k not in columns[i]][: min(wanted, limit - len(columns[i]))]
            columns[i] += fresh
            scores[i] += [float(table[k, i]) for k in fresh]
    assert products is not None
    names = products.names
    picks = {n: columns[i if granularity == "layer" else 0] for i, n in enumerate(names)}
    loss = sum(values) / len(values) if values else None
    rows: tuple[list[Any], list[Any], list[Any]] = (columns, scores, margins)
    if granularity == "layer":
        at = {n: i for i, n in enumerate(names)}
        rows = tuple([r[at[n]] if n in at else None for n in problem.names] for r in rows)  # type: ignore[assignment]
    return picks, Iteration(t, loss, gap, 0.0, 0.0, *rows), products


class _Trial(Objective):
    """ℓ(θ + Σ w_j (s_j − θ)) and its gradient in w, over vertices held in memory."""

    def __init__(self, problem: Problem, picks: Picks, gradient: GradientFunction, per: str) -> None:
        self.problem, self.picks, self.gradient, self.per = problem, picks, gradient, per
        self.vertices: dict[str, list[Tensor]] = {n: [self._hold(n, k) for k in ks] for n, ks in picks.items()}
        self.trial: State = {n: problem.theta[n].clone() for n in problem.theta}

    def _hold(self, name: str, k: int) -> Tensor:
        read = self.problem.pool.vertex(name, k)
        size = self.problem.parts[name].numel
        out = torch.empty(size, dtype=read(0, 0, "fw0").dtype, device=self.problem.device)

        def copy(_: str, begin: int, end: int) -> None:
            out[begin:end] = read(begin, end, "fw0")

        self.problem.pool.each({name: size}, copy)
        return out.view(self.problem.local_shape(name))

    def _mix(self, w: Tensor, out: Mapping[str, Tensor]) -> None:
        full = w.expand(w.shape[0], len(self.picks))
        for i, name in enumerate(self.picks):
            theta = self.problem.theta[name]
            weighted_sum(theta, self.vertices[name], full[:, i].tolist(), out=out[name])

    def __call__(self, w: Tensor) -> tuple[float | None, Tensor]:
        """(loss or None, its gradient in w)."""
        self._mix(w, self.trial)
        taken, value = ask(self.problem, self.gradient, self.trial)
        gradient = torch.zeros(w.shape[0], len(self.picks), dtype=torch.float64, device="cpu")
        for i, name in enumerate(self.picks):
            if name in taken and self.problem.layout.counts(name):
                dots = inner_products(taken[name], [*self.vertices[name], self.problem.theta[name]])
                gradient[:, i] = dots[:-1] - dots[-1]
        gradient = self.problem.layout.reduce(gradient)
        if self.per == "model":
            gradient = gradient.sum(1, keepdim=True)
        return value, gradient

    def slopes(self, products: Products) -> Tensor:
        """The gradient in w at w = 0, from the products of the selection."""
        at = {n: i for i, n in enumerate(products.names)}
        rows = [[float(products.dots[k, at[n]] - products.point[at[n]]) for k in ks] for n, ks in self.picks.items()]
        out = torch.tensor(rows, dtype=torch.float64, device="cpu").T
        return out.sum(1, keepdim=True) if self.per == "model" else out

    def squares(self) -> Tensor:
        """‖s_j − θ‖², shaped as w."""
        out = torch.zeros(len(next(iter(self.picks.values()))), len(self.picks), dtype=torch.float64, device="cpu")
        for i, name in enumerate(self.picks):
            if self.problem.layout.counts(name):
                theta = self.problem.theta[name]
                for j, s in enumerate(self.vertices[name]):
                    d = s.to(theta) - theta
                    out[j, i] = inner_products(d, [d])[0]
        out = self.problem.layout.reduce(out)
        return out.sum(1, keepdim=True) if self.per == "model" else out

    def move(self, w: Tensor) -> None:
        """θ ← θ + Σ w_j (s_j − θ)."""
        self._mix(w, self.problem.theta)


def inner_products(g: Tensor, others: Sequence[Tensor]) -> Tensor:
    """[K] ⟨g, x⟩, float64."""
    g = g.detach().reshape(-1)
    return fw_products(g, [x.reshape(-1).to(g.device) for x in others], norms=False).dots.cpu()

"""Hard Frank-Wolfe merging: one vertex per layer (or model) and iteration."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import BadInput, check_choice
from . import presets, steps
from .choice import Choice, Products, choose, total_row
from .inner import Inner
from .norms import NormCache, default_folder
from .problem import Problem, State, open_start, opened_problem
from .result import Coefficients, FrankWolfeResult
from .trace import Iteration, Trace

SAME = "hold the same weights; the second is never chosen"
METRICS = ("dot", "cosine", "slope")
GradientFunction = Callable[[State], Mapping[str, Tensor]]
Progress = Callable[[int, int, Iteration], None]


@presets.with_presets(presets.HARD)
def frank_wolfe(
    base: Any,
    candidates: Iterable[Any],
    gradient: GradientFunction,
    *,
    iterations: int = 10,
    step_size: float = 0.1,
    scale: float = 0.29,
    inner: str = "task_arithmetic",
    granularity: Literal["layer", "model"] = "layer",
    metric: Literal["dot", "cosine", "slope"] = "dot",
    zero_if_ascent: bool = False,
    init: Any = "merge",
    preset: str | None = None,
    step: Literal["harmonic", "constant", "line_search", "short"] = "harmonic",
    pool_init: bool = False,
    inner_parameters: Mapping[str, Any] | None = None,
    loss: Callable[[State], float] | None = None,
    lipschitz: float | None = None,
    search_evaluations: int = 12,
    gap_tolerance: float | None = None,
    select: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    space: Literal["weights", "deltas"] | None = None,
    missing: Literal["error", "zero"] = "error",
    lora: Literal["product", "factors"] = "product",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    norm_cache: str | Path | bool = True,
    trace: str | Path | None = None,
    progress: Progress | None = None,
    shards: Mapping[str, tuple[int, int]] | None = None,
    group: Any = None,
    allow_pickle: bool = False,
) -> FrankWolfeResult:
    """Merge by Frank-Wolfe: minimise a calibration loss over the convex hull of any number of candidates.

    Per iteration t: g = ∇ℓ(θ_t); s_t = argmin over candidates of ⟨g, s⟩ (per tensor with granularity "layer", which
    is the product of the tensors' hulls, or for the whole model); θ_{t+1} = MergeFn(θ_t, [s_t], η_t). With the default
    inner merge θ_{t+1} = θ_t + η_t (s_t − θ_t), η_t = scale · step_size · 2/(t + 2).

    Args:
        base: path, hub id, state_dict or module. Its names, dtypes and non-floating tensors are the result's.
        candidates: the same kinds, and folders of LoRA adapters; read piece by piece, once per iteration.
        gradient: ``f(state_dict) -> {name: Tensor}`` at float32 weights, e.g. from ``fm.gradient``. Tensors without a
            gradient keep what the start gives them.
        step: "harmonic" (η as above), "constant" (η = scale·step_size), or rules that find η in [0, 1] themselves and
            ignore step_size and scale: "line_search" on the loss, one η for all tensors; "short", η of each layer (or
            of the model) gap / (L‖s − θ‖²), L = `lipschitz` or found by backtracking on the loss.
        inner: a merge method; its ``lambda`` takes η. `inner_parameters` are its others (weight defaults to 1).
        metric: "dot" (the paper), "cosine" between gradient and raw candidate (the authors' code), or "slope",
            ⟨g, s − θ⟩ / ‖s − θ‖: the way down that is steepest, which a vertex does not win by being far away.
        zero_if_ascent: a tensor whose best score is not negative moves towards zero instead (in the space of deltas,
            towards the base).
        init: "merge" (the inner merge of all candidates with `scale`), "base", or a checkpoint or state_dict.
        pool_init: the start is the last candidate, called "initial" (one more copy of the model in memory).
        preset: "robust" (slope, short steps, from the base: for pools of unknown use), "published" or "fusion_bench";
            explicit arguments win over it.
        loss: ``f(state_dict) -> float``; default: ``gradient.loss`` when there is one.
        gap_tolerance: stop when the duality gap is at most this.
        select, exclude: regular expressions; floating tensors that match none of select or any of exclude keep the
            base's values.
        space: "weights", or "deltas" (products with s − base; the default when all candidates are adapters). Under
            "dot" the choice is the same.
        missing: "zero" lets a candidate lack tensors: they are its zero vertex. Adapters may always.
        lora: "product" merges B·A, as the model uses it; "factors" merges A and B apart (the authors' code), with a
            base that holds the factors.
        norm_cache: folder for norms (cosine only), True for ``~/.cache/fastmerge/norms``, False for none.
        trace: the JSON is written here after every iteration.
        shards: {name: (begin, end)}: this process holds these elements of each flattened tensor; gradients are of those
            elements, and torch.distributed (`group`) adds the K·L products. DTensors in `base` need no shards.

    Memory: θ in float32, the gradient, and one buffer per thread, whatever the number of candidates; a searching step
    holds one copy of θ more, an inner merge other than task arithmetic a vertex and its result.
    Numerics: scores are class B (see ``ops.fw_products``), steps class A; choices agree across machines wherever the
    margin in the trace exceeds the rounding error.
    Cost: per iteration one gradient and one read of every candidate, plus one model's worth for the step.
    Raises: BadInput, naming the candidate and tensor, for anything that does not fit, is damaged or not finite.
    Source: FW-Merging (arXiv:2503.12649), alg. 1; Jaggi 2013 (gap); Lacoste-Julien et al. 2013 (products of hulls).
    """
    check(iterations, step_size, scale, step, metric, granularity, missing, space, lora, shards, zero_if_ascent)
    maker = Inner(inner, inner_parameters, seed=seed)
    loss = loss or getattr(gradient, "loss", None)
    if step == "line_search" and loss is None:
        raise BadInput("step='line_search' needs the loss", remedy="pass loss=, or a gradient made by fm.gradient")
    short = steps.ShortStep(lipschitz, loss) if step == "short" else None
    if step == "short" and not maker.linear:
        raise BadInput("step='short' is a formula for inner='task_arithmetic'", remedy="use step='line_search'")
    with opened_problem(
        base, candidates, select=select, exclude=exclude, missing=missing, space=space, lora=lora,
        device=device, shards=shards, group=group, allow_pickle=allow_pickle,
    ) as problem:  # fmt: skip
        if problem.layout.sharded and not maker.linear:
            raise BadInput("sharded tensors need inner='task_arithmetic'", remedy="other methods need whole tensors")
        pool = problem.pool
        open_start(problem, init, lambda: maker.start(problem, scale), allow_pickle)
        if pool_init:
            problem.add_initial()
        record = Trace(
            {
                "method": "frank_wolfe", "preset": preset, "iterations": iterations, "step": step, "step_size": step_size,
                "scale": scale, "inner": inner, "inner_parameters": maker.parameters, "granularity": granularity,
                "metric": metric, "zero_if_ascent": zero_if_ascent, "init": init if isinstance(init, str) else "given",
                "pool_init": pool_init, "space": problem.space, "seed": seed, "base": problem.base.label,
            },
            pool.labels,
            problem.names if granularity == "layer" else ["model"],
        )  # fmt: skip
        weights = Coefficients(problem.names, len(pool.candidates), pool_init)
        norms = Norms(problem, norm_cache) if metric == "cosine" else None
        for t in range(iterations):
            clock = time.perf_counter()
            found, value = ask(problem, gradient)
            asked = time.perf_counter()
            products = measure(problem, found, norms, relative=metric == "slope")
            if t == 0:
                record.duplicates = duplicates(problem, products)
            choice = choose(products, metric=metric, granularity=granularity, zero_if_ascent=zero_if_ascent)
            chosen = time.perf_counter()
            picks = dict(
                zip(products.names, choice.chosen * (1 if granularity == "layer" else len(products.names)), strict=True)
            )
            here = Iteration(t, value, choice.gap, 0.0, 0.0, *_rows(problem, products, choice, granularity))
            record.iterations.append(here)
            here.seconds = {"gradient": asked - clock, "oracle": chosen - asked}
            done = _stop(products, choice, gap_tolerance)
            if not done:
                eta: float | dict[str, float]
                if step in steps.SEARCHING:
                    if value is None and loss is not None:
                        value = here.loss = problem.layout.average(float(loss(problem.state())))
                    search = _Search(problem, maker, picks, loss, t)
                    if short is None:
                        assert value is not None
                        eta, _ = steps.line_search(search.at, value, evaluations=search_evaluations)
                    else:
                        eta = search.short(short, found, products, value, granularity, relative=metric == "slope")
                    done = "" if (any(eta.values()) if isinstance(eta, dict) else eta) else "no step lowers the loss"
                    here.gamma = sum(eta.values()) / len(eta) if isinstance(eta, dict) else eta
                    here.coefficient = here.gamma
                    del search
                else:
                    here.gamma = steps.decaying(step, t, step_size)
                    here.coefficient = eta = scale * here.gamma
                del found  # the step needs the memory more
                each = eta if isinstance(eta, dict) else dict.fromkeys(picks, eta)
                if isinstance(eta, dict) and granularity == "layer":
                    here.coefficients = [each.get(n) for n in problem.names]
                if any(each.values()):
                    maker.step(problem, problem.theta, picks, eta, t)
                    for name, k in picks.items():
                        weights.move(name, {k: each[name]})
                here.seconds["step"] = time.perf_counter() - chosen
            record.stopped = done or ("all iterations done" if t + 1 == iterations else "")
            if trace is not None:
                record.save(trace)
            if progress is not None:
                progress(t + 1, iterations, here)
            if done:
                break
        return FrankWolfeResult(problem.finish(dtype), record, weights.rows if maker.linear else {})


def check(
    iterations: int, step_size: float, scale: float, step: str, metric: str, granularity: str, missing: str,
    space: str | None, lora: str, shards: Any, zero_if_ascent: bool,
) -> None:  # fmt: skip
    """Raises BadInput for a setting that means nothing."""
    for what, value, known in (
        ("step", step, steps.RULES),
        ("metric", metric, METRICS),
        ("granularity", granularity, ("layer", "model")),
        ("missing", missing, ("error", "zero")),
        ("space", space or "weights", ("weights", "deltas")),
        ("lora", lora, ("product", "factors")),
    ):
        check_choice(what, value, known)
    if zero_if_ascent and metric == "slope":
        raise BadInput(
            "zero_if_ascent is a rule for scores of raw candidates", remedy="leave it out, or use metric='cosine'"
        )
    if iterations < 0:
        raise BadInput(
            f"iterations must be at least 0, not {iterations}", remedy="give the number of steps; 0 returns the start"
        )
    for what, number in (("step_size", step_size), ("scale", scale)):
        if not (math.isfinite(number) and number >= 0):
            raise BadInput(
                f"{what} must be a finite number >= 0, not {number}",
                remedy="leave it out: the defaults, step_size=0.1 and scale=0.29, are the papers'",
            )


def ask(problem: Problem, gradient: GradientFunction, at: State | None = None) -> tuple[State, float | None]:
    """The gradient at θ (or another point), and the loss when the callable knows it."""
    with torch.enable_grad():
        found = gradient(problem.state(at))
    value = getattr(gradient, "value", None)
    taken = problem.take_gradient(found, getattr(gradient, "aliases", None))
    return taken, None if value is None else problem.layout.average(float(value))


class Norms:
    """‖s‖² of candidates for cosines: from disk, else computed in the first pass and kept."""

    def __init__(self, problem: Problem, cache: str | Path | bool) -> None:
        self.problem = problem
        self.known: dict[str, Tensor] = {}  # [K] per tensor
        self.cache = None
        # A process that holds a part of a tensor has a part of its norm: nothing to keep.
        if cache is not False and not problem.layout.sharded:
            folder = default_folder() if cache is True else Path(cache)
            self.cache = NormCache(folder, problem.base, problem.space)
            stored = self.cache.load(problem.pool.candidates, problem.names)
            self.known = {n: stored[:, i] for i, n in enumerate(problem.names)}

    def wanted(self, names: Sequence[str]) -> list[bool]:
        """Per candidate, whether the next pass has to compute its norms."""
        count = len(self.problem.pool.candidates)
        return [any(n not in self.known or bool(self.known[n][k].isnan()) for n in names) for k in range(count)]

    def take(self, products: Products, computed: Sequence[bool]) -> None:
        """Keep the norms of a pass, and complete the pass with those known before."""
        unknown = torch.full_like(products.squares[:, 0], float("nan"))
        before = torch.stack([self.known.get(n, unknown) for n in products.names], dim=1)
        products.squares = torch.where(torch.tensor(list(computed), device="cpu")[:, None], products.squares, before)
        self.known.update(zip(products.names, products.squares.unbind(1), strict=True))
        if any(computed) and self.cache is not None:
            names = list(self.known)
            table = torch.stack([self.known[n] for n in names], dim=1)
            self.cache.save(self.problem.pool.candidates, names, table)


def measure(problem: Problem, gradients: State, norms: Norms | None, *, relative: bool = False) -> Products:
    """Products over all processes, with norms when the metric needs them; `relative`: from θ (the slope's)."""
    wanted = norms.wanted(list(gradients)) if norms is not None else [relative] * len(problem.pool.candidates)
    failure = None
    try:
        products = problem.pool.products(gradients, problem.theta, norms=wanted, relative=relative)
    except BadInput as error:
        failure = error
    problem.layout.agree(failure)
    if problem.layout.sharded:
        products = problem.layout.reduce_products(products, problem.names)
    if norms is not None:
        norms.take(products, wanted)
    return products


def duplicates(problem: Problem, products: Products) -> list[tuple[int, int]]:
    """Pairs of candidates with equal tensors, warned of by name: equal products first, then element by element."""
    out = []
    seen: dict[bytes, int] = {}
    if not bool(products.gradient.any()):
        return []
    for k, row in enumerate(products.dots):
        first = seen.setdefault(row.numpy().tobytes(), k)
        if first != k and (problem.layout.sharded or problem.pool.same(first, k)):
            out.append((first, k))
            a, b = problem.pool.labels[first], problem.pool.labels[k]
            warnings.warn(f"candidates {a!r} and {b!r} {SAME}", stacklevel=4)
    return out


def _rows(
    problem: Problem, products: Products, choice: Choice, granularity: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Choices, scores and margins per layer of the trace; None where a tensor has no gradient."""
    if granularity == "model":
        return choice.chosen, choice.scores, choice.margins
    at = {n: i for i, n in enumerate(products.names)}

    def lay_out(row: Sequence[Any]) -> list[Any]:
        return [row[at[n]] if n in at else None for n in problem.names]

    return lay_out(choice.chosen), lay_out(choice.scores), lay_out(choice.margins)


def _stop(products: Products, choice: Choice, tolerance: float | None) -> str:
    if not bool(products.gradient.any()):
        return "the gradient is zero"
    if tolerance is not None and choice.gap <= tolerance:
        return f"the gap is at most {tolerance:g}"
    return ""


class _Search:
    """What a searching rule asks for: the loss at trial points, which live in one more copy of θ."""

    def __init__(
        self, problem: Problem, maker: Inner, picks: Mapping[str, int], loss: Callable[[State], float] | None, t: int
    ) -> None:
        self.problem, self.maker, self.picks, self.loss, self.t = problem, maker, picks, loss, t
        self.trial: State = {}

    def at(self, step: float | Mapping[str, float]) -> float:
        """ℓ after a step."""
        assert self.loss is not None
        self.trial = self.trial or self.problem.empty()
        for name, x in self.problem.theta.items():
            self.trial[name].copy_(x)
        self.maker.step(self.problem, self.trial, self.picks, step, self.t)
        return self.problem.layout.average(float(self.loss(self.problem.state(self.trial))))

    def short(
        self, rule: steps.ShortStep, found: State, products: Products, value: float | None, granularity: str, *,
        relative: bool,
    ) -> dict[str, float]:  # fmt: skip
        """γ of every tensor; one for all with granularity "model"."""
        names = list(self.picks)
        if relative:
            column = {n: i for i, n in enumerate(products.names)}
            at = [(k, column[n]) for n, k in self.picks.items()]
            table = torch.stack([torch.stack([-products.dots[c], products.squares[c]]) for c in at])
        else:
            table = self.maker.direction(self.problem, self.picks, found)
        if granularity == "model":
            table = total_row(table.T).T
        spread = (
            (lambda y: dict.fromkeys(names, y[0]))
            if granularity == "model"
            else (lambda y: dict(zip(names, y, strict=True)))
        )
        return spread(rule(table[:, 0].tolist(), table[:, 1].tolist(), value, lambda y: self.at(spread(y))))


__all__ = ["FrankWolfeResult", "GradientFunction", "frank_wolfe"]

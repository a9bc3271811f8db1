"""Soft Frank-Wolfe: selections, coefficients and their gradients against the formulas, projections against scipy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.test_frank_wolfe import SHAPES, Quadratic, torched, toy, with_far_networks
from scipy.optimize import minimize

from fastmerge import fw
from fastmerge.errors import BadInput
from fastmerge.fw.problem import opened_problem
from fastmerge.fw.simplex import project_capped, project_simplex
from fastmerge.fw.soft import _Trial

NAMES = list(SHAPES)


def opened(base, candidates):
    return opened_problem(
        torched(base), [torched(c) for c in candidates], select=None, exclude=None, missing="error", space=None,
        lora="product", device=None, shards=None, group=None, allow_pickle=False,
    )  # fmt: skip


def test_simplex_projection_by_hand():
    got = project_simplex(torch.tensor([[0.5, 1.2, 3.0], [0.3, 0.9, 1.0], [-0.1, -0.5, 0.0]], dtype=torch.float64))
    # Columns: (0.5, 0.3, −0.1) has sum 0.7 and all stay: + 0.1 each, the last at 0; (1.2, 0.9, −0.5): τ = 0.55;
    # (3, 1, 0): only the first survives.
    np.testing.assert_allclose(got.T, [[0.6, 0.4, 0.0], [0.65, 0.35, 0.0], [1.0, 0.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(project_capped(torch.tensor([0.2, -1.0, 0.3])), [0.2, 0.0, 0.3], atol=1e-7)
    np.testing.assert_allclose(project_capped(torch.tensor([2.0, 0.5])), [1.0, 0.0], atol=1e-7)
    for bad in (torch.tensor([]), torch.tensor([float("nan"), 1.0])):
        with pytest.raises(BadInput):
            project_simplex(bad)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7))
def test_simplex_projection_is_the_nearest_point(values):
    v = np.array(values)
    got = project_simplex(torch.tensor(values, dtype=torch.float64)).numpy()
    assert got.min() >= 0
    assert got.sum() == pytest.approx(1)
    # Optimality (Karush-Kuhn-Tucker): v − w is one constant where w > 0, and at most that elsewhere.
    rest = v - got
    tau = rest[got > 0].mean()
    np.testing.assert_allclose(rest[got > 0], tau, atol=1e-9)
    assert (rest <= tau + 1e-9).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(1e-3, 1e3)), min_size=1, max_size=7))
def test_scaled_projection_is_the_nearest_point(pairs):
    v, d = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))
    got = project_simplex(v, metric=d)
    assert got.min() >= 0
    assert float(got.sum()) == pytest.approx(1)
    rest = d * (v - got)  # one constant where w > 0, at most that elsewhere
    tau = float(rest[got > 0].mean())
    np.testing.assert_allclose(rest[got > 0], tau, rtol=1e-8, atol=1e-8 * float(d.max()))
    assert (rest <= tau + 1e-8 * float(d.max())).all()
    capped = project_capped(v, metric=d)
    assert torch.equal(capped, v.clamp(min=0) if v.clamp(min=0).sum() <= 1 else got)


@pytest.mark.parametrize("per", ["layer", "model"])
def test_coefficient_gradients_are_inner_products(per):
    base, candidates, target, curvature = toy(2)
    gradient = Quadratic(target, curvature)
    picks = {n: [(i + j) % 4 for j in range(3)] for i, n in enumerate(NAMES)}
    with opened(base, candidates) as problem:
        problem.start_from(None)
        trial = _Trial(problem, picks, gradient, per)
        w = torch.rand(3, 3 if per == "layer" else 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        value, slope = trial(w)

        def loss(w):
            w = w.expand(3, 3).numpy()
            state = {
                n: base[n] + sum(w[j, i] * (candidates[k][n] - base[n]) for j, k in enumerate(picks[n]))
                for i, n in enumerate(NAMES)
            }
            return gradient.loss(torched(state, torch.float64))

        assert value == pytest.approx(loss(w), rel=1e-5)
        step = 1e-5
        for index in itertools.product(*map(range, w.shape)):
            up, down = w.clone(), w.clone()
            up[index] += step
            down[index] -= step
            assert float(slope[index]) == pytest.approx((loss(up) - loss(down)) / (2 * step), rel=1e-3, abs=1e-3)


def soft_formula(base, candidates, target, curvature, *, metric, k, lr, inner, iterations, project):
    theta = {n: base[n].copy() for n in NAMES}
    history = []
    for _ in range(iterations):
        g = {n: curvature[n] * (theta[n] - target[n]) for n in NAMES}
        table = np.array([[np.sum(g[n] * c[n]) for n in NAMES] for c in candidates])
        if metric == "cosine":
            table /= np.array([[np.linalg.norm(g[n]) * np.linalg.norm(c[n]) for n in NAMES] for c in candidates])
        picks = table.argsort(0, kind="stable")[:k]
        w = np.full((k, len(NAMES)), 1.0 / k)
        for _ in range(inner):
            slope = np.zeros_like(w)
            for i, n in enumerate(NAMES):
                deltas = [candidates[j][n] - theta[n] for j in picks[:, i]]
                at = theta[n] + sum(a * d for a, d in zip(w[:, i], deltas, strict=True))
                slope[:, i] = [np.sum(curvature[n] * (at - target[n]) * d) for d in deltas]
            w = project(w - lr * slope)
        for i, n in enumerate(NAMES):
            theta[n] = theta[n] + sum(
                a * (candidates[j][n] - theta[n]) for a, j in zip(w[:, i], picks[:, i], strict=True)
            )
        history.append((picks.T.tolist(), w.T.tolist()))
    return theta, history


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("constraint", ["simplex", "capped", "none"])
def test_projected_gradient_matches_the_formulas(metric, constraint):
    base, candidates, target, curvature = toy(4)
    project = {
        "simplex": lambda w: project_simplex(torch.tensor(w)).numpy(),
        "capped": lambda w: project_capped(torch.tensor(w)).numpy(),
        "none": lambda w: w,
    }[constraint]
    theta, history = soft_formula(
        base, candidates, target, curvature, metric=metric, k=3, lr=0.01, inner=4, iterations=3, project=project
    )
    got = fw.frank_wolfe_soft(
        torched(base), [torched(c) for c in candidates], Quadratic(target, curvature), iterations=3, top_k=3,
        inner_steps=4, inner_lr=0.01, metric=metric, constraint=constraint, start=1 / 3,
    )  # fmt: skip
    assert got.choices == [h[0] for h in history]
    for here, (_, w) in zip(got.trace.iterations, history, strict=True):
        np.testing.assert_allclose(here.coefficients, w, atol=2e-5)
    for n in base:
        np.testing.assert_allclose(got.state_dict[n].numpy(), theta[n], rtol=2e-5, atol=2e-5)
    for n, row in got.coefficients.items():
        rebuilt = row[0] * base[n] + sum(w * c[n] for w, c in zip(row[1:-1], candidates, strict=True))
        np.testing.assert_allclose(rebuilt, theta[n], atol=1e-3)


def test_all_vertices_on_the_simplex_reach_the_optimum_of_the_hull():
    base, candidates, target, curvature = toy(6)
    got = fw.frank_wolfe_soft(
        torched(base), [torched(c) for c in candidates], Quadratic(target, curvature), iterations=1, top_k=4,
        inner_steps=150,
    )  # fmt: skip
    for n in base:

        def loss(w, n=n):
            at = sum(a * c[n] for a, c in zip(w, candidates, strict=True))
            return float((curvature[n] * (at - target[n]) ** 2).sum()) / 2

        best = minimize(
            loss, np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}
        )
        found = got.coefficients[n][1:-1]
        assert min(found) >= 0
        assert sum(found) == pytest.approx(1)
        assert loss(found) <= best.fun * (1 + 1e-3) + 1e-4


def test_far_useless_candidates_do_not_hold_up_the_coefficients():
    base, near, far, gradient = with_far_networks()
    start = gradient.loss(torched(base))
    left = {}
    for name, pool in {"alone": near, "beside": [*near, *far]}.items():
        got = fw.frank_wolfe_soft(
            torched(base), [torched(c) for c in pool], gradient, preset="robust", top_k=len(pool), inner_steps=12
        )
        losses = [i.loss for i in got.trace.iterations] + [gradient.loss(got.state_dict)]
        assert all(b <= a for a, b in itertools.pairwise(losses))
        left[name] = losses[-1] / start
    assert left["alone"] < 0.02
    assert left["beside"] < left["alone"] + 0.02


def test_soft_starts_from_the_merge_of_all():
    base, candidates, target, curvature = toy(3)
    got = fw.frank_wolfe_soft(
        torched(base),
        [torched(c) for c in candidates],
        Quadratic(target, curvature),
        init="merge",
        scale=0.4,
        iterations=0,
    )
    for n in base:
        want = base[n] + 0.4 * sum(c[n] - base[n] for c in candidates)
        np.testing.assert_allclose(got.state_dict[n].numpy(), want, rtol=2e-6, atol=2e-6)


def test_first_slopes_come_from_the_selection():
    base, candidates, target, curvature = toy(2)
    for metric in ("dot", "slope"):
        gradient = Quadratic(target, curvature)
        calls = []
        counted = Counted(gradient, calls)
        got = fw.frank_wolfe_soft(
            torched(base), [torched(c) for c in candidates], counted, iterations=1, top_k=3, constraint="capped",
            metric=metric, inner_steps=3,
        )  # fmt: skip
        assert len(calls) == 3  # one for the selection and the coefficients at 0, two more
        again = fw.frank_wolfe_soft(
            torched(base), [torched(c) for c in candidates], counted, iterations=1, top_k=3, constraint="capped",
            metric=metric, inner_steps=3, inner_gradient=gradient,
        )  # fmt: skip
        for n in base:
            torch.testing.assert_close(got.state_dict[n], again.state_dict[n], rtol=1e-4, atol=1e-4)


class Counted:
    def __init__(self, gradient, calls):
        self.gradient, self.calls, self.value = gradient, calls, None

    def __call__(self, state):
        self.calls.append(1)
        found = self.gradient(state)
        self.value = self.gradient.value
        return found


def test_capped_never_raises_the_loss():
    base, candidates, _, curvature = toy(7)
    gradient = Quadratic({n: sum(c[n] for c in candidates) / 4 for n in base}, curvature)
    got = fw.frank_wolfe_soft(
        torched(base), [torched(c) for c in candidates], gradient, iterations=6, top_k=2, constraint="capped"
    )
    losses = [i.loss for i in got.trace.iterations] + [gradient.loss(got.state_dict)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    for i in got.trace.iterations:
        assert all(b <= a for a, b in itertools.pairwise(i.inner_losses))


class Tasks(Quadratic):
    """Two quadratics with one target each; the mean of both is the objective."""

    def __init__(self, targets, curvature):
        super().__init__({n: sum(t[n] for t in targets) / len(targets) for n in targets[0]}, curvature)
        self.parts = {f"task {i}": Quadratic(t, curvature) for i, t in enumerate(targets)}
        self.tasks = tuple(self.parts)

    def task(self, name):
        return self.parts[name]


def test_published_soft_picks_one_vertex_per_task_and_none_twice():
    base, candidates, _, curvature = toy(8)
    # Both tasks want candidate 2 most; the second must take its next best.
    near = [{n: 3 * candidates[2][n] for n in base}, {n: 3 * candidates[2][n] + 0.1 for n in base}]
    gradient = Tasks(near, curvature)
    got = fw.frank_wolfe_soft(
        torched(base), [torched(c) for c in candidates], gradient, preset="published", inner_steps=3, iterations=2
    )
    g = {n: curvature[n] * (base[n] - near[0][n]) for n in base}
    h = {n: curvature[n] * (base[n] - near[1][n]) for n in base}
    cosines = [
        [sum(np.sum(x[n] * c[n]) / np.linalg.norm(x[n]) / np.linalg.norm(c[n]) for n in base) for c in candidates]
        for x in (g, h)
    ]
    first = int(np.argmin(cosines[0]))
    second = min((k for k in range(4) if k != first), key=lambda k: cosines[1][k])
    assert first == 2
    assert got.choices[0] == [[first, second]]
    # Adam's first step has length lr whatever the gradient: 0.3 ± 1e-3 after one, within 3e-3 after three.
    w = np.array(got.trace.iterations[0].coefficients)
    assert (np.abs(np.abs(w - 0.3) - 3e-3) < 5e-4).all()
    assert np.abs(np.array(got.trace.iterations[1].coefficients)).max() <= 3.1e-3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"top_k": 0}, "top_k must be"),
        ({"constraint": "ball"}, "constraint must be"),
        ({"optimizer": "adam"}, "needs inner_lr"),
        ({"selection": "tasks"}, "one gradient per task"),
        ({"inner_lr": -1.0}, "inner_lr must be positive"),
        ({"scale": -0.1}, "scale must be a finite"),
        ({"metric": "l2"}, "metric must be one of"),
        ({"preset": "publish"}, "did you mean 'published'"),
    ],
)
def test_bad_input_is_named(change, match):
    base, candidates, target, curvature = toy()
    with pytest.raises(BadInput, match=match):
        fw.frank_wolfe_soft(torched(base), [torched(c) for c in candidates], Quadratic(target, curvature), **change)


def test_backtracking_needs_to_know_the_loss():
    base, candidates, *_ = toy()
    with pytest.raises(BadInput, match="does not tell"):
        fw.frank_wolfe_soft(torched(base), [torched(candidates[0])], lambda s: {n: t + 1 for n, t in s.items()})

"""Step sizes of hard Frank-Wolfe that look for themselves: line search, short steps, by layer and for the whole model."""

import itertools

import numpy as np
import pytest
import torch
from quadratic import Quadratic, torched, toy

from fastmerge import fw
from fastmerge.fw.steps import ShortStep


@pytest.mark.parametrize("step", ["line_search", "short"])
def test_searching_steps_never_raise_the_loss_and_converge(step):
    base, candidates, _, curvature = toy(1, count=3)
    inside = {n: sum(c[n] for c in candidates) / 3 for n in base}
    gradient = Quadratic(inside, curvature)
    got = fw.frank_wolfe(
        torched(base), [torched(c) for c in candidates], gradient, init=torched(candidates[0]), step=step, iterations=25
    )
    losses = [i.loss for i in got.trace.iterations] + [gradient.loss(got.state_dict)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.02 * losses[0]


def test_short_step_with_a_known_constant():
    # L = 2, gap = 12, |s − θ|² = 16: γ = 12 / 32.
    gradient = Quadratic({"w": [3.0, 0.0]}, {"w": [1.0, 1.0]})
    pool = [{"w": torch.tensor([4.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}]
    got = fw.frank_wolfe({"w": torch.zeros(2)}, pool, gradient, init="base", step="short", lipschitz=2.0, iterations=1)
    assert got.trace.iterations[0].gamma == 0.375
    assert got.state_dict["w"].tolist() == [1.5, 0.0]


@pytest.mark.parametrize("granularity", ["layer", "model"])
@pytest.mark.parametrize("metric", ["slope", "dot"])
def test_short_steps_match_the_formulas(metric, granularity):
    base, candidates, target, curvature = toy(seed=5)
    names, smooth = list(base), 30.0
    got = fw.frank_wolfe(
        torched(base), [torched(c) for c in candidates], Quadratic(target, curvature), init="base", iterations=4,
        metric=metric, granularity=granularity, step="short", lipschitz=smooth,
    )  # fmt: skip
    theta = {n: base[n].copy() for n in names}
    for here in got.trace.iterations:
        g = {n: curvature[n] * (theta[n] - target[n]) for n in names}
        dots = np.array([[np.sum(g[n] * (c[n] - theta[n])) for n in names] for c in candidates])
        squares = np.array([[np.sum((c[n] - theta[n]) ** 2) for n in names] for c in candidates])
        raw = np.array([[np.sum(g[n] * c[n]) for n in names] for c in candidates])
        if granularity == "model":
            dots, squares, raw = (x.sum(1, keepdims=True) for x in (dots, squares, raw))
        scores = dots / np.sqrt(squares) if metric == "slope" else raw
        picks = scores.argmin(0)
        assert here.choices == picks.tolist()
        np.testing.assert_allclose(here.scores, scores.min(0), rtol=1e-5, atol=1e-5)
        assert here.gap == pytest.approx(-dots.min(0).sum(), rel=1e-4)
        columns = np.arange(len(picks))
        gammas = np.clip(-dots[picks, columns] / (smooth * squares[picks, columns]), 0, 1)
        assert here.gamma == pytest.approx(gammas.mean(), rel=1e-5)
        if granularity == "layer":
            np.testing.assert_allclose(here.coefficients, gammas, rtol=1e-5)
        for i, n in enumerate(names):
            i = i if granularity == "layer" else 0
            theta[n] += gammas[i] * (candidates[picks[i]][n] - theta[n])
    for n in names:
        np.testing.assert_allclose(got.state_dict[n].numpy(), theta[n], rtol=1e-5, atol=1e-5)


def test_each_layer_takes_its_own_short_step():
    # ℓ = ½|a − 1|² + ½|b − 3|² from 0, L = 1: slope of a towards 4 is −1·4/4 = −1, towards −1 it is 1; γ_a = 4/16.
    # b towards −2 or −5 only: both ascend, b stays. gap = 4 + (−6), which does not hold up a.
    gradient = Quadratic({"a": [1.0], "b": [3.0]}, {"a": [1.0], "b": [1.0]})
    pool = [
        {"a": torch.tensor([4.0]), "b": torch.tensor([-2.0])},
        {"a": torch.tensor([-1.0]), "b": torch.tensor([-5.0])},
    ]
    base = {"a": torch.zeros(1), "b": torch.zeros(1)}
    got = fw.frank_wolfe(base, pool, gradient, preset="robust", lipschitz=1.0, iterations=1)
    only = got.trace.iterations[0]
    assert only.choices == [0, 0]
    assert only.scores == [-1.0, 3.0]
    assert only.coefficients == [0.25, 0.0]
    assert only.gap == -2.0
    assert got.state_dict == {"a": torch.tensor([1.0]), "b": torch.zeros(1)}
    assert got.coefficients == {"a": [0.75, 0.25, 0.0, 0.0], "b": [1.0, 0.0, 0.0, 0.0]}


@pytest.mark.parametrize(
    ("start", "there"), [(float("nan"), float("nan")), (1.0, float("nan")), (0.0, 1.0), (2.0, 3.0)]
)
def test_a_short_step_gives_up_where_no_loss_is_lower(start, there):
    asked = []
    rule = ShortStep(None, lambda state: 0.0)
    assert rule([1.0, -1.0], [2.0, 2.0], start, lambda gammas: asked.append(gammas) or there) == [0.0, 0.0]
    assert 1 <= len(asked) <= 60
    assert all(g[0] > 0 == g[1] for g in asked)

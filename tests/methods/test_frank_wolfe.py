"""Hard Frank-Wolfe against the formulas (in numpy, float64, written out here) and its own properties."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic import SHAPES, Quadratic, torched, toy

from fastmerge import fw
from fastmerge.errors import BadInput
from fastmerge.fw import hard
from fastmerge.fw.choice import choose
from fastmerge.fw.oracle import PIECE
from fastmerge.fw.problem import opened_problem
from fastmerge.ops import fw_lmo


def formula(base, candidates, target, curvature, *, metric, granularity, zero, pool, init, steps, scale=0.29):
    """The algorithm as written down in the paper and in the authors' code, one line per definition."""
    names = list(base)
    theta = {n: base[n].copy() for n in names}
    if init == "merge":
        theta = {n: base[n] + scale * sum(c[n] - base[n] for c in candidates) for n in names}
    vertices = [*candidates, {n: theta[n].copy() for n in names}] if pool else list(candidates)
    choices, scores = [], []
    for gamma in steps:
        g = {n: curvature[n] * (theta[n] - target[n]) for n in names}
        table = np.array([[np.sum(g[n] * v[n]) for n in names] for v in vertices])
        if metric == "cosine":
            table /= np.array([[np.linalg.norm(g[n]) * np.linalg.norm(v[n]) for n in names] for v in vertices])
        if granularity == "model":
            table = table.sum(1, keepdims=True)
        best = table.argmin(0)
        score = table.min(0)
        pick = np.where(score >= 0, -1, best) if zero else best
        choices.append(pick.tolist())
        scores.append(score.tolist())
        for i, n in enumerate(names):
            k = pick[i if granularity == "layer" else 0]
            s = np.zeros_like(theta[n]) if k < 0 else vertices[k][n]
            theta[n] = theta[n] + scale * gamma * (s - theta[n])
    return theta, choices, scores


@pytest.mark.parametrize(
    ("metric", "granularity", "zero", "pool"),
    list(itertools.product(["dot", "cosine"], ["layer", "model"], [False, True], [False, True])),
)
def test_trajectory_matches_the_formulas(metric, granularity, zero, pool):
    base, candidates, target, curvature = toy(seed=3, shift=0.4)
    for step, init in (("harmonic", "merge"), ("constant", "base")):
        steps = [2 / (t + 2) * 0.5 if step == "harmonic" else 0.5 for t in range(5)]
        theta, choices, scores = formula(
            base, candidates, target, curvature,
            metric=metric, granularity=granularity, zero=zero, pool=pool, init=init, steps=steps,
        )  # fmt: skip
        got = fw.frank_wolfe(
            torched(base), [torched(c) for c in candidates], Quadratic(target, curvature),
            iterations=5, step=step, step_size=0.5, init=init, metric=metric, granularity=granularity,
            zero_if_ascent=zero, pool_init=pool,
        )  # fmt: skip
        assert got.choices == choices
        for here, want in zip(got.trace.iterations, scores, strict=True):
            np.testing.assert_allclose(here.scores, want, rtol=2e-5, atol=2e-5)
        for n in base:
            np.testing.assert_allclose(got.state_dict[n].numpy(), theta[n], rtol=2e-6, atol=2e-6)


def test_two_steps_by_hand():
    # ℓ = ½|θ − (3, 0)|². θ₀ = (0, 0), g = (−3, 0): ⟨g, (4, 0)⟩ = −12 wins; γ₀ = 1, θ₁ = (4, 0).
    # g = (1, 0): ⟨g, (0, 2)⟩ = 0 < 4 wins; γ₁ = 2/3, θ₂ = (4, 0) + 2/3·(−4, 2) = (4/3, 4/3). gap₀ = 12, gap₁ = 4.
    gradient = Quadratic({"w": [3.0, 0.0]}, {"w": [1.0, 1.0]})
    pool = [{"w": torch.tensor([4.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}]
    got = fw.frank_wolfe({"w": torch.zeros(2)}, pool, gradient, init="base", step_size=1.0, scale=1.0, iterations=2)
    assert got.choices == [[0], [1]]
    assert [i.gap for i in got.trace.iterations] == [12.0, 4.0]
    assert [i.loss for i in got.trace.iterations] == [4.5, 0.5]
    assert [i.margins for i in got.trace.iterations] == [[12.0], [4.0]]
    torch.testing.assert_close(got.state_dict["w"], torch.tensor([4 / 3, 4 / 3]))
    np.testing.assert_allclose(got.coefficients["w"], [0, 1 / 3, 2 / 3, 0], atol=1e-12)


def test_published_coefficients():
    # λ·γ_t for λ = 0.29 and step size 0.1: the table of the authors' run.
    base, candidates, target, curvature = toy()
    got = fw.frank_wolfe(torched(base), [torched(c) for c in candidates], Quadratic(target, curvature), iterations=3)
    coefficients = [i.coefficient for i in got.trace.iterations]
    np.testing.assert_allclose(coefficients, [0.029, 0.019333, 0.0145], atol=5e-7)


@pytest.mark.parametrize(
    ("preset", "granularity", "zero", "scale"),
    [("published", "layer", True, 0.29), ("fusion_bench", "model", False, 0.3)],
)
def test_presets(preset, granularity, zero, scale):
    base, candidates, target, curvature = toy(seed=5, shift=0.3)
    steps = [2 / (t + 2) * 0.1 for t in range(10)]
    theta, choices, _ = formula(
        base, candidates, target, curvature,
        metric="cosine", granularity=granularity, zero=zero, pool=True, init="merge", steps=steps, scale=scale,
    )  # fmt: skip
    got = fw.frank_wolfe(torched(base), [torched(c) for c in candidates], Quadratic(target, curvature), preset=preset)
    assert got.choices == choices
    for n in base:
        np.testing.assert_allclose(got.state_dict[n].numpy(), theta[n], rtol=2e-6, atol=2e-6)
    assert got.trace.candidates[-1] == "initial"
    explicit = fw.frank_wolfe(
        torched(base), [torched(c) for c in candidates], Quadratic(target, curvature), preset=preset, metric="dot"
    )
    assert explicit.trace.settings["metric"] == "dot"
    with pytest.raises(BadInput, match="did you mean 'published'"):
        fw.frank_wolfe(torched(base), [torched(base)], Quadratic(target, curvature), preset="publishd")


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["harmonic", "constant", "line_search", "short"]))
def test_iterates_stay_in_the_hull_and_the_gap_is_not_negative(seed, step):
    base, candidates, target, curvature = toy(seed, count=3)
    gradient = Quadratic(target, curvature)
    got = fw.frank_wolfe(
        torched(base), [torched(c) for c in candidates], gradient,
        init=torched(candidates[1]), step=step, step_size=1.0, scale=1.0, iterations=6,
    )  # fmt: skip
    scale = max(abs(i.gap) for i in got.trace.iterations)
    assert all(i.gap >= -1e-5 * scale for i in got.trace.iterations)
    for n, row in got.coefficients.items():
        assert min(row) >= 0
        assert sum(row) == pytest.approx(1)
        rebuilt = row[0] * candidates[1][n] + sum(w * c[n] for w, c in zip(row[1:-1], candidates, strict=True))
        np.testing.assert_allclose(got.state_dict[n].numpy(), rebuilt, rtol=1e-5, atol=1e-5)
    # The gap bounds what is left to gain over the hull: ℓ(θ) − ℓ(any vertex mixture) <= gap.
    last = got.trace.iterations[-1]
    mean = {n: torch.tensor(sum(c[n] for c in candidates) / 3) for n in base}
    assert last.loss - gradient.loss(mean) <= last.gap + 1e-4 * scale


def with_far_networks(seed=11, count=4):
    """A problem whose candidates are of use, and as many networks far away that are not."""
    base, candidates, _, curvature = toy(seed, count=count)
    target = {n: sum(c[n] for c in candidates) / count for n in base}
    rng = np.random.default_rng(seed)
    far = [{n: 40 * rng.normal(size=s) for n, s in SHAPES.items()} for _ in range(count)]
    return base, candidates, far, Quadratic(target, curvature)


def test_far_useless_candidates_do_not_disturb_the_robust_preset():
    base, near, far, gradient = with_far_networks()
    start = gradient.loss(torched(base))

    def left(pool, **options):
        got = fw.frank_wolfe(torched(base), [torched(c) for c in pool], gradient, iterations=12, **options)
        losses = [i.loss for i in got.trace.iterations] + [gradient.loss(got.state_dict)]
        return losses[-1] / start, losses, got

    alone, _, _ = left(near, preset="robust")
    beside, losses, got = left([*near, *far], preset="robust")
    assert alone < 0.15
    assert beside < alone + 0.02
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert got.coefficients.keys() == SHAPES.keys()
    # ⟨g, s⟩ prefers what is far away, and one step for all layers is then as short as the worst needs.
    assert left([*near, *far], init="base", step="line_search")[0] > 2 * beside


def test_robust_preset_and_its_limits():
    base, candidates, target, curvature = toy()
    gradient = Quadratic(target, curvature)
    got = fw.frank_wolfe(torched(base), [torched(c) for c in candidates], gradient, preset="robust", iterations=0)
    assert got.trace.settings["metric"] == "slope"
    assert (got.trace.settings["step"], got.trace.settings["init"]) == ("short", "base")
    with pytest.raises(BadInput, match="rule for scores of raw"):
        fw.frank_wolfe(torched(base), [torched(base)], gradient, metric="slope", zero_if_ascent=True)
    # A candidate that equals θ has no direction: slope 0, no NaN, and nothing moves.
    same = fw.frank_wolfe(torched(base), [torched(base)], gradient, preset="robust", iterations=2)
    assert same.trace.iterations[0].scores == [0.0, 0.0, 0.0]
    assert same.trace.stopped == "no step lowers the loss"
    for n, t in torched(base).items():
        assert torch.equal(same.state_dict[n], t)


def test_gap_stops_the_run():
    base, candidates, _, curvature = toy(1, count=3)
    gradient = Quadratic({n: sum(c[n] for c in candidates) / 3 for n in base}, curvature)
    pool = [torched(c) for c in candidates]
    got = fw.frank_wolfe(
        torched(base), pool, gradient, init=pool[0], step="line_search", iterations=200, gap_tolerance=0.5
    )
    gaps = [i.gap for i in got.trace.iterations]
    assert gaps[-1] <= 0.5 < min(gaps[:-1])
    assert got.trace.stopped == "the gap is at most 0.5"
    zero = fw.frank_wolfe(torched(base), pool, lambda s: {n: torch.zeros_like(t) for n, t in s.items()})
    assert zero.trace.stopped == "the gradient is zero"


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_streamed_products_are_those_of_the_operator_bit_for_bit(metric, granularity):
    g = torch.Generator().manual_seed(0)
    shapes = {"big": (2 * PIECE + 77,), "matrix": (64, 33), "scalar": (), "empty": (0, 4)}
    pool = [{n: torch.randn(s, generator=g).bfloat16() for n, s in shapes.items()} for _ in range(6)]
    gradient = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    base = {n: torch.zeros(s) for n, s in shapes.items()}
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with opened_problem(
                base, pool, select=None, exclude=None, missing="error", space=None, lora="product", device=None,
                shards=None, group=None, allow_pickle=False,
            ) as problem:  # fmt: skip
                problem.start_from(None)
                products = problem.pool.products(gradient, problem.theta, norms=[True] * 6)
                got = choose(products, metric=metric, granularity=granularity, zero_if_ascent=False)
        finally:
            torch.set_num_threads(before)
        want = fw_lmo(
            list(gradient.values()), [[c[n] for n in shapes] for c in pool], metric=metric, granularity=granularity
        )
        assert torch.equal(got.table, want.score)
        assert got.chosen == want.choice.tolist()


def test_zero_norms_and_ties():
    # A zero gradient or candidate scores 0, never NaN; equal scores go to the first candidate.
    base = {"a": torch.ones(3), "b": torch.ones(2)}
    zero, same = {"a": torch.zeros(3), "b": torch.ones(2)}, {"a": torch.ones(3), "b": torch.ones(2)}
    pool = [zero, same, {"a": torch.ones(3), "b": torch.tensor([1.0, 2.0])}]
    got = fw.frank_wolfe(
        base, pool, lambda s: {"a": torch.ones(3), "b": torch.zeros(2)}, metric="cosine", iterations=1, init="base"
    )
    assert got.trace.iterations[0].scores == [0.0, 0.0]
    assert got.choices == [[0, 0]]


def test_theta_is_float32_and_cast_once():
    # Steps of 0.1 % of a bf16 value are below half an ulp: in bf16 nothing would move.
    base = {"w": torch.ones(64, dtype=torch.bfloat16)}
    pool = [{"w": torch.full((64,), 1.5, dtype=torch.bfloat16)}]
    dtypes = []

    def gradient(state):
        dtypes.append(state["w"].dtype)
        return {"w": -torch.ones(64)}

    got = fw.frank_wolfe(base, pool, gradient, init="base", step="constant", step_size=1.0, scale=0.002, iterations=10)
    assert set(dtypes) == {torch.float32}
    want = torch.tensor(1.0)
    for _ in range(10):
        want = want + (1.5 - want) * torch.tensor(0.002)
    assert got.state_dict["w"].dtype == torch.bfloat16
    assert got.state_dict["w"].unique().tolist() == [want.bfloat16().item()]
    assert want.bfloat16().item() > 1.0
    assert fw.frank_wolfe(base, pool, gradient, dtype=torch.float32).state_dict["w"].dtype == torch.float32


def test_what_is_not_merged():
    base = {
        "w": torch.zeros(3), "frozen": torch.full((2,), 5.0), "steps": torch.tensor(7), "norm.bias": torch.ones(2),
    }  # fmt: skip
    pool = [{n: t + 1 for n, t in base.items()} for _ in range(2)]
    pool[1]["w"] = pool[1]["w"] + 1
    got = fw.frank_wolfe(
        base,
        pool,
        lambda s: {"w": torch.ones(3), "frozen": None},
        exclude="norm",
        scale=0.5,
        step_size=1.0,
        iterations=1,
    )
    # No gradient: the start's value (5 + ½·(1 + 1)); excluded and integer tensors: the base's.
    assert got.state_dict["frozen"].tolist() == [6.0, 6.0]
    assert got.state_dict["norm.bias"].tolist() == [1.0, 1.0]
    assert got.state_dict["steps"].item() == 7
    assert got.choices == [[0, None]]
    assert got.state_dict["w"].tolist() == [1.25] * 3  # 1.5 + ½·(1 − 1.5)


def test_tied_tensors_stay_tied():
    w = torch.zeros(4, 2)
    base = {"embed.weight": w, "head.weight": w}
    other = torch.ones(4, 2)
    got = fw.frank_wolfe(
        base,
        [{"embed.weight": other, "head.weight": other}],
        lambda s: {"embed.weight": -torch.ones(4, 2)},
        iterations=1,
    )
    assert got.state_dict["head.weight"] is got.state_dict["embed.weight"]
    assert got.choices == [[0]]


def test_trace_round_trip_and_plot(tmp_path):
    base, candidates, target, curvature = toy()
    seen = []
    got = fw.frank_wolfe(
        torched(base), [torched(c) for c in candidates], Quadratic(target, curvature), iterations=3,
        trace=tmp_path / "deep" / "trace.json", progress=lambda done, total, it: seen.append((done, total, it.gap)),
    )  # fmt: skip
    loaded = fw.Trace.load(tmp_path / "deep" / "trace.json")
    assert loaded == got.trace
    assert [s[:2] for s in seen] == [(1, 3), (2, 3), (3, 3)]
    content = json.loads((tmp_path / "deep" / "trace.json").read_text())
    assert content["layers"] == list(SHAPES)
    assert content["iterations"][0]["choices"] == got.choices[0]
    assert [sum(row) for row in loaded.shares()] == pytest.approx([1.0] * 3)
    picture = loaded.plot(tmp_path / "trace.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BadInput, match="not a Frank-Wolfe trace"):
        fw.Trace.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"metric": "l2"}, "metric must be one of"),
        ({"granularity": "row"}, "granularity must be"),
        ({"step": "newton"}, "step must be"),
        ({"scale": float("nan")}, "scale must be a finite"),
        ({"iterations": -1}, "iterations must be"),
        ({"inner": "tiess"}, "unknown merge method"),
        ({"inner": "linear"}, "no parameter lambda or t"),
        ({"inner_parameters": {"densty": 1}}, "no 'densty'"),
        ({"exclude": "("}, "not a regular expression"),
        ({"exclude": ""}, "leave no floating-point tensor"),
        ({"step": "line_search", "gradient": lambda s: {}}, "needs the loss"),
        ({"step": "short", "gradient": lambda s: {}}, "smoothness"),
        ({"candidates": []}, "no candidates"),
        ({"candidates": [3]}, r"candidates\[0\] is a int"),
        ({"candidates": [{"other": torch.zeros(2)}]}, "no tensor of the base"),
        ({"gradient": lambda s: 3}, "returned a int"),
        ({"gradient": lambda s: {}}, "none of the merged"),
        ({"gradient": lambda s: {"encoder.weigth": torch.zeros(2)}}, "did you mean 'encoder.weight'"),
        ({"gradient": lambda s: {"encoder.weight": torch.zeros(2)}}, r"shape \[2\]"),
        ({"gradient": lambda s: {n: torch.full_like(t, float("nan")) for n, t in s.items()}}, "gradient of 'encoder"),
    ],
)
def test_bad_input_is_named(change, match):
    base, candidates, target, curvature = toy()
    call = {"candidates": [torched(c) for c in candidates], "gradient": Quadratic(target, curvature), **change}
    with pytest.raises(BadInput, match=match):
        fw.frank_wolfe(torched(base), call.pop("candidates"), call.pop("gradient"), **call)


def test_every_problem_of_the_candidates_is_listed():
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(BadInput) as caught:
        fw.frank_wolfe(base, [{"a": torch.zeros(2)}, {"a": torch.zeros(9), "b": torch.zeros(3).int()}], lambda s: {})
    text = str(caught.value)
    assert "candidates[0]" in text
    assert "'b' first" in text
    assert "missing='zero'" in text
    assert "shape [9]" in text
    assert "torch.int32" in text


def test_wrapper_keeps_the_signature():
    import inspect

    names = list(inspect.signature(hard.frank_wolfe).parameters)
    assert names[:12] == [
        "base", "candidates", "gradient", "iterations", "step_size", "scale", "inner", "granularity", "metric",
        "zero_if_ascent", "init", "preset",
    ]  # fmt: skip


def test_any_registered_method_is_an_inner_merge():
    base, candidates, target, curvature = toy(9)
    normalized = {"weight": 2.0, "normalize": True}  # Σ wᵢ δᵢ / Σ wᵢ: the mean delta, not their sum
    got = fw.frank_wolfe(
        torched(base), [torched(c) for c in candidates], Quadratic(target, curvature),
        inner_parameters=normalized, iterations=3, step_size=1.0, scale=0.4,
    )  # fmt: skip
    theta = {n: base[n] + 0.4 * sum(c[n] - base[n] for c in candidates) / 4 for n in base}
    choices = []
    for t in range(3):
        g = {n: curvature[n] * (theta[n] - target[n]) for n in base}
        pick = [int(np.argmin([np.sum(g[n] * c[n]) for c in candidates])) for n in base]
        for n, k in zip(base, pick, strict=True):
            theta[n] = theta[n] + 0.4 * 2 / (t + 2) * (candidates[k][n] - theta[n])
        choices.append(pick)
    assert got.choices == choices
    for n in base:
        np.testing.assert_allclose(got.state_dict[n].numpy(), theta[n], rtol=2e-6, atol=2e-6)
    assert got.coefficients == {}
    assert got.trace.settings["inner_parameters"] == normalized

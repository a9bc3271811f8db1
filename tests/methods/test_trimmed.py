"""ties, dare, breadcrumbs and della: formulas, invariance, folders against memory."""

import pytest
import torch
from checkpoints import load, near, save, tiny_state
from checks import assert_same_bits

import fastmerge as fm
from fastmerge.errors import BadInput
from fastmerge.io import pipeline
from fastmerge.methods import _thresholds


def family(count=3, shape=(53, 41), seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    return base, [base + 0.1 * torch.randn(shape, generator=g) for _ in range(count)]


def keep_top(delta, density):
    """Plain TIES trim: the k largest magnitudes, ties to the lowest index."""
    flat = delta.reshape(-1).abs()
    k = max(1, int(density * flat.numel())) if density > 0 else 0
    order = flat.sort(descending=True, stable=True).indices[:k]
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order] = True
    return torch.where(mask.view(delta.shape), delta, 0.0)


def ties_by_hand(base, models, weight, density, lam, masks=None):
    deltas = [m - base for m in models]
    kept = (
        [keep_top(d, density) for d in deltas]
        if masks is None
        else [torch.where(m, d, 0.0) for m, d in zip(masks, deltas, strict=True)]
    )
    weighted = [w * k for w, k in zip(weight, kept, strict=True)]
    sign = torch.where(sum(weighted) >= 0, 1.0, -1.0)
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for w, u in zip(weight, weighted, strict=True):
        agree = u.sign() == sign
        total = total + torch.where(agree, u, 0.0)
        divisor = divisor + torch.where(agree, w, 0.0)
    return base + lam * total / torch.where(divisor == 0, 1.0, divisor)


def test_ties_golden_by_hand():
    base = torch.zeros(4)
    a, b = torch.tensor([4.0, -1.0, 0.5, 2.0]), torch.tensor([-1.0, -3.0, 2.0, 2.5])
    # density 0.5 keeps a: [4, ., ., 2], b: [., -3, ., 2.5]; signs + - + +; means of those that agree
    got = fm.merge("ties", {"w": base}, [{"w": a}, {"w": b}], weight=1.0, density=0.5)["w"]
    assert got.tolist() == [4.0, -3.0, 0.0, 2.25]


@pytest.mark.parametrize("density", [0.0, 0.03, 0.2, 0.7, 1.0])
def test_ties_is_the_formula(density):
    base, models = family()
    weight = [0.5, 0.3, 0.9]
    got = fm.merge("ties", {"w": base}, [{"w": m} for m in models], weight=weight, density=density, lambda_=0.8)["w"]
    assert torch.allclose(got, ties_by_hand(base, models, weight, density, 0.8), atol=1e-6)


def test_ties_over_the_whole_model():
    g = torch.Generator().manual_seed(3)
    base = {"a": torch.zeros(30, 7), "b": torch.zeros(11), "c": torch.zeros(5, 5)}
    models = [
        {k: torch.randn(v.shape, generator=g) * s for (k, v), s in zip(base.items(), (1.0, 3.0, 0.1), strict=True)}
        for _ in range(2)
    ]
    got = fm.merge("ties", base, models, weight=1.0, density=0.25, scope="model")
    flat = [torch.cat([m[k].reshape(-1) for k in base]) for m in models]
    masks = [keep_top(f, 0.25) != 0 for f in flat]
    want = ties_by_hand(torch.zeros_like(flat[0]), flat, [1.0, 1.0], 1.0, 1.0, masks)
    assert torch.allclose(torch.cat([got[k].reshape(-1) for k in base]), want)


def test_model_scope_needs_one_density():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    with pytest.raises(BadInput, match="same for every tensor"):
        fm.merge(
            "ties", base, [base], weight=1.0, density=[{"filter": "a", "value": 0.5}, {"value": 0.2}], scope="model"
        )


METHODS = {
    "ties": {"density": 0.3},
    "ties model": {"density": 0.3, "scope": "model"},
    "dare_linear": {"density": 0.4},
    "dare_ties": {"density": 0.4, "rescale_norm": "density"},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.05, "rescale": True},
    "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.5, "epsilon": 0.2, "rescale_norm": "density"},
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_streamed_folders_have_the_bits_of_memory(tmp_path, case, dtype, monkeypatch):
    method = case.split()[0]
    base = tiny_state(0, dtype=dtype) | {"big": torch.randn(301, 700).to(dtype)}
    states = [base, *(near(base, i + 1) for i in range(3))]
    folders = [save(tmp_path / str(i), s, shards=i + 1) for i, s in enumerate(states)]
    want = fm.merge(method, states[0], states[1:], weight=[0.4, 0.2, 0.6], **METHODS[case])
    monkeypatch.setattr(_thresholds, "WHOLE", 100)
    monkeypatch.setattr(pipeline, "CHUNK", pipeline.BLOCK)
    recipe = fm.Recipe.from_call(
        method, str(folders[0]), [str(f) for f in folders[1:]], {"weight": [0.4, 0.2, 0.6], **METHODS[case]}
    )
    for threads in (1, 3):
        fm.run(recipe, tmp_path / f"out{threads}", threads=threads)
        for name, got in load(tmp_path / f"out{threads}").items():
            assert_same_bits(got, want[name], name)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_trims_depend_on_seed_and_name_and_keep_the_density(method):
    base, (model,) = family(1, (200, 300))
    kwargs = {"weight": 1.0, "density": 0.3, "rescale": False} | ({"epsilon": 0.1} if method == "della_linear" else {})

    def run(name="w", seed=0):
        return fm.merge(method, {name: base}, [{name: model}], seed=seed, **kwargs)[name]

    first = run()
    assert_same_bits(run(), first)
    changed = first != base
    assert 0.28 < float(changed.float().mean()) < 0.32
    assert not torch.equal(run(seed=1), first)
    assert not torch.equal(run(name="v"), first)
    assert torch.allclose(first[changed], model[changed], atol=1e-6)


def test_l1_rescale_restores_the_norm():
    base, (model,) = family(1, (200, 300))
    got = fm.merge("dare_linear", {"w": base}, [{"w": model}], weight=1.0, density=0.3)["w"]
    delta = (got - base).abs().sum()
    assert torch.allclose(delta, (model - base).abs().sum(), rtol=1e-3)


def test_breadcrumbs_drops_both_tails():
    base = torch.zeros(10)
    model = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, 6.0, -7.0, 8.0, 9.0, -10.0])
    got = fm.merge("breadcrumbs", {"w": base}, [{"w": model}], weight=1.0, density=0.5, gamma=0.2)["w"]
    assert got.tolist() == [0.0, 0.0, 0.0, -4.0, 5.0, 6.0, -7.0, 8.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("method", "parameters", "match"),
    [
        ("ties", {"density": -2.0}, r"density must be in \[0, 1\], not -2"),
        ("ties", {"density": 7}, r"density must be in \[0, 1\], not 7"),
        ("ties", {"densty": 0.2}, "did you mean 'density'"),
        ("ties", {"weight": float("nan")}, "weight must be finite"),
        ("della", {"density": 0.1, "epsilon": 0.2}, "strictly inside"),
        ("ties", {"density": 0.5, "scope": "modle"}, "scope must be one of tensor, model"),
    ],
)
def test_bad_parameters_are_named(method, parameters, match):
    state = tiny_state()
    with pytest.raises(BadInput, match=match):
        fm.merge(method, state, [near(state, 1)], **{"weight": 1.0, **parameters})

"""sce, ram, ramplus_tl and arcee_fusion by hand, by their formulas, and in pieces."""

import math

import pytest
import torch
from checkpoints import load, save
from checks import assert_same_bits, relative_rms

import fastmerge as fm
from fastmerge.errors import BadInput


def merged(method, base, models, **parameters):
    return fm.merge(method, {"w": base}, [{"w": m} for m in models], **parameters)["w"]


def deltas_on(base, *deltas):
    return [base + torch.tensor(d) for d in deltas]


def test_sce_by_hand():
    base = torch.zeros(3)
    models = deltas_on(base, [2.0, -1.0, 0.0], [1.0, 3.0, 0.0])
    # mean squares 5/3 and 10/3: weights 1/3 and 2/3; the majority signs are +, +, +
    want = torch.tensor([(2 / 3 + 2 / 3) / 1.0, 3.0, 0.0])
    assert torch.allclose(merged("sce", base, models), want)


def test_sce_selects_by_variance_of_the_elements_that_differ():
    base = torch.zeros(5)
    # variances 0.25, 4, 0, 1, 0: three differ, int(0.67 · 3) = 2 are kept
    models = deltas_on(base, [1.0, 4.0, 7.0, 0.0, 0.0], [2.0, 0.0, 7.0, 2.0, 0.0])
    # selected: [4, 0] of elements 1 and 3 against [0, 2]: energies 16 and 4
    assert torch.allclose(merged("sce", base, models, select_topk=0.67), torch.tensor([0.0, 4.0, 0.0, 2.0, 0.0]))
    assert torch.equal(merged("sce", base, models, select_topk=0.3), base)  # int(0.3 · 3) = 0 elements
    assert torch.equal(merged("sce", base, models, select_topk=0.0), base)


@pytest.mark.parametrize("where", ["everywhere", "in one place", "nowhere", "once"])
def test_sce_counts_and_selects_in_one_read_whatever_the_sample_says(where, tmp_path):
    """A sample that saw few or none of the elements that differ costs passes, not the result."""
    g = torch.Generator().manual_seed(4)
    base = torch.randn(700_001, generator=g)
    spots = {
        "everywhere": slice(None),
        "in one place": slice(123_000, 127_000),
        "nowhere": slice(0),
        "once": slice(9, 10),
    }
    models = [base.clone() for _ in range(2)]
    for m in models:
        m[spots[where]] += 0.1 * torch.randn(m[spots[where]].shape, generator=g)
    paths = [save(tmp_path / str(i), {"w": t}) for i, t in enumerate((base, *models))]
    recipe = fm.Recipe.from_call("sce", str(paths[0]), [str(p) for p in paths[1:]], {"select_topk": 0.6})
    fm.run(recipe, tmp_path / "out", threads=2)
    want = fm.merge("sce", {"w": base}, [{"w": m} for m in models], select_topk=0.6)
    assert_same_bits(load(tmp_path / "out")["w"], want["w"])
    differ = int(((models[0] - models[1]) != 0).sum())
    assert int((want["w"] != base).sum()) == int(0.6 * differ)


def test_sce_weights_of_small_deltas_do_not_collapse_unless_asked_to():
    base = torch.zeros(2)
    models = deltas_on(base, [1e-4, 1e-4], [3e-4, 3e-4])
    got = merged("sce", base, models)
    assert torch.allclose(got, torch.full((2,), (0.1 * 1e-4 + 0.9 * 3e-4)), rtol=1e-5)
    assert torch.allclose(merged("sce", base, models, uniform_below=1e-6), torch.full((2,), 2e-4), rtol=1e-5)
    assert torch.equal(merged("sce", base, [base, base]), base)


def test_ram_by_hand():
    base = torch.ones(4)
    models = deltas_on(base, [0.5, 0.5, 0.0, 1e-6], [0.0, 1.5, 0.0, 0.25])
    assert torch.allclose(merged("ram", base, models), torch.tensor([1.5, 2.0, 1.0, 1.25]))
    assert torch.allclose(merged("ram", base, models, epsilon=0.4), torch.tensor([1.5, 2.0, 1.0, 1.0]))


def test_ramplus_amplifies_what_is_unique():
    base = torch.zeros(4)
    models = deltas_on(base, [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 3.0, 1.0])
    # shared/unique: 1/2 and 1/1
    got = merged("ramplus_tl", base, models, r=0.2, alpha=0.75)
    assert torch.allclose(got, torch.tensor([1.1, 1.1, 2.0, 1.15]))
    # a model that changed nothing alone: ratio clamped to alpha, and nothing to amplify
    assert torch.allclose(merged("ramplus_tl", base, [models[0], models[0]], epsilon=0.0), models[0])


def arcee(base, other):
    """The formula in float64, quantiles by sorting."""
    delta = other - base
    p, q = other.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    importance = delta.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    q1, q2, q3 = (ordered[int(x * (len(ordered) - 1))] for x in (0.25, 0.5, 0.75))
    return torch.where(importance >= q2 + 1.5 * (q3 - q1), other, base)


def test_arcee_fusion_by_hand():
    base, other = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0], [0.0, 1e-3]])
    # only the first row's first element has both a delta and a divergence worth naming: KL of (3/4, 1/4) to (1/2, 1/2)
    # importances 0.144, 0, 0, ~1e-10; q₁ = q₂ = 0, q₃ = 1e-10
    got = merged("arcee_fusion", base, [other])
    assert torch.equal(got, torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("shape", [(40, 31), (97,), (3, 5, 7), (1,), ()])
def test_arcee_fusion_is_the_formula(shape):
    g = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=g, dtype=torch.float64)
    other = base + 0.1 * torch.randn(shape, generator=g, dtype=torch.float64)
    want = arcee(base, other) if base.ndim else arcee(base[None], other[None])[0]
    assert relative_rms(merged("arcee_fusion", base, [other]), want) < 1e-12


def test_arcee_fusion_wants_one_other_model():
    with pytest.raises(BadInput, match="arcee_fusion"):
        merged("arcee_fusion", torch.ones(2), [torch.ones(2), torch.ones(2)])


SHAPES = {"big": (611, 643), "small": (5, 7), "vector": (300,), "empty": (0, 4)}
IN_PIECES = {
    "sce": {},
    "sce, selected": {"select_topk": 0.3},
    "ram": {"epsilon": 0.05},
    "ramplus_tl": {"epsilon": 0.05, "alpha": 2.0},
    "arcee_fusion": {},
    "nuslerp, along rows": {"weight": [0.3, 0.7], "nuslerp_flatten": False},
    "nuslerp, along columns": {"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "model_stock, by filter": {"filter_wise": True},
}
COUNT = {"arcee_fusion": 1, "nuslerp": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", IN_PIECES)
def test_pieces_give_the_bits_of_the_whole(case, dtype, tmp_path):
    g = torch.Generator().manual_seed(1)
    base = {k: torch.randn(s, generator=g) for k, s in SHAPES.items()}
    moved = [
        {
            k: v + 0.1 * torch.randn(v.shape, generator=g) * (torch.rand(v.shape, generator=g) < 0.7)
            for k, v in base.items()
        }
        for _ in range(3)
    ]
    method = case.partition(",")[0]
    count = COUNT.get(method, 3)
    states = [{k: v.to(dtype) for k, v in s.items()} for s in (base, *moved[:count])]
    paths = [save(tmp_path / str(i), s) for i, s in enumerate(states)]
    whole = fm.merge(method, states[0], states[1:], **IN_PIECES[case])
    for threads in (1, 2):
        recipe = fm.Recipe.from_call(method, str(paths[0]), [str(p) for p in paths[1:]], IN_PIECES[case])
        fm.run(recipe, tmp_path / f"out{threads}", threads=threads)
        pieces = load(tmp_path / f"out{threads}")
        assert pieces.keys() == whole.keys()
        for name, tensor in whole.items():
            assert_same_bits(pieces[name], tensor)

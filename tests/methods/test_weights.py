"""Weights that sum to 0: a refusal with a remedy before anything is written, or a divisor of 1, by method."""

import re

import pytest
import torch
import zoo
from checkpoints import load, near, tiny_state
from checks import assert_same_bits
from command_line import call, refused, three_checkpoints, write

import fastmerge as fm
from fastmerge.errors import BadInput
from fastmerge.methods import get, names

BASE = tiny_state()
MODELS = [near(BASE, 1), near(BASE, 2)]
DIVIDES_BY_ONE = [n for n in names() if "normalize" in get(n).parameters and n != "linear"]


@pytest.mark.parametrize("method", ["linear", "multislerp"])
@pytest.mark.parametrize("weight", [[1, -1], [0, 0], [0.1 + 0.2, -0.3]])
def test_a_mean_needs_a_sum(method, weight):
    normalize = "normalize" if method == "linear" else "normalize_weights"
    with pytest.raises(
        BadInput, match=rf"(?s)weights .* sum to .*embed_tokens.*change them, or set {normalize}: false"
    ):
        fm.merge(method, BASE, MODELS, weight=weight)
    if method == "linear":
        got = fm.merge(method, None, MODELS, weight=weight, normalize=False)["model.norm.weight"]
        want = sum(torch.tensor(w) * m["model.norm.weight"] for w, m in zip(weight, MODELS, strict=True))
        assert torch.equal(got, want)


def test_one_tensor_s_weights_are_enough_and_nothing_is_written(tmp_path):
    three_checkpoints(tmp_path)

    def recipe(weight):
        models = [{"model": str(tmp_path / n), "parameters": {"weight": w}} for n, w in (("a", 1), ("b", weight))]
        return write(tmp_path, merge_method="linear", base_model=None, models=models)

    name = "model.layers.1.mlp.up_proj.weight"
    filtered = recipe([{"filter": "layers.1.mlp", "value": -1}, {"value": 1}])
    with pytest.raises(BadInput, match=rf"(?s)\[1\.0, -1\.0\] sum to 0.*{re.escape(name)}"):
        fm.run(filtered, tmp_path / "out")
    refused(call("merge", filtered, tmp_path / "out"), name, "set normalize: false")
    with pytest.raises(BadInput, match=r"where: model\.layers\.2"):
        fm.run(recipe([1, 0, -1]), None, dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "recipe.yml"]
    fm.run(recipe([{"filter": "layers.1.mlp", "value": -0.5}, {"value": 1}]), tmp_path / "out")
    assert torch.allclose(load(tmp_path / "out")[name], 2 * MODELS[0][name] - MODELS[1][name], atol=1e-6)


@pytest.mark.parametrize("method", DIVIDES_BY_ONE)
@pytest.mark.parametrize("weight", [[1, -1], [0, 0]])
def test_a_sum_of_deltas_is_left_undivided(method, weight):
    """The whole family's rule for a sum of 0: the divisor is 1."""
    density = {"density": 0.5} if "density" in get(method).parameters else {}
    merged, plain = (
        fm.merge(method, BASE, MODELS, weight=weight, normalize=normalize, **density) for normalize in (True, False)
    )
    for name, tensor in merged.items():
        assert tensor.isfinite().all()
        if weight == [0, 0]:
            assert torch.equal(tensor, BASE[name])
        elif method in ("task_arithmetic", "dare_linear", "breadcrumbs", "della_linear"):
            assert_same_bits(tensor, plain[name], name)


@pytest.mark.parametrize("weight", [[1, -1], [0, 0]])
def test_nuslerp_takes_the_middle(weight):
    got, want = (fm.merge("nuslerp", None, MODELS, weight=w) for w in (weight, [1, 1]))
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("weight", [[1, -1], [0, 0], [1, -1, 1]])
def test_mudsc_grows_its_average_model_by_model(weight):
    state = zoo.build("vit").state_dict()
    with pytest.raises(
        BadInput, match=rf"(?s)the weights {re.escape(str([float(w) for w in weight[:2]]))} sum to 0.*above 0"
    ):
        fm.merge("mudsc", None, [state] * len(weight), weight=weight, heads=3)


def test_mudsc_takes_a_model_of_weight_zero():
    state = zoo.build("vit").state_dict()
    for name, tensor in fm.merge("mudsc", None, [state, state, state], weight=[0, 0, 1], heads=3).items():
        torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=1e-6)

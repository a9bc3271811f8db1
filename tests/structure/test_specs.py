"""The tracer and the shipped specs say the same, and both preserve the function."""

import json

import pytest
import torch
import zoo
from torch import nn

from fastmerge.errors import BadInput
from fastmerge.structure import PermutationSpec, check_spec, named_spec, spec_for


@pytest.mark.parametrize("name", zoo.ZOO)
def test_shipped_spec_is_what_the_tracer_derives(name):
    model, (_, inputs, architecture, options) = zoo.build(name), zoo.ZOO[name]
    shipped = named_spec(architecture, model, **options)
    assert check_spec(model, shipped, inputs()) <= 1e-4
    traced = spec_for(model, inputs())
    assert traced.signature() == shipped.signature()


@pytest.mark.parametrize("name", zoo.ZOO)
def test_architectures_are_recognised_by_their_tensor_names(name):
    model, (_, _, architecture, options) = zoo.build(name), zoo.ZOO[name]
    spec = named_spec(None, model.state_dict(), **options)
    assert spec.architecture == architecture
    assert PermutationSpec.from_json(spec.to_json()).signature() == spec.signature()


class Odd(nn.Module):
    """Things no shipped architecture has: concatenation, a grouped convolution, a head split with one shared norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.c = nn.Conv2d(20, 6, 1)
        self.norm = nn.LayerNorm(3)
        self.shuffle = nn.PixelShuffle(2)
        self.d = nn.Conv2d(6, 8, 1)
        self.out = nn.Linear(2, 4)

    def forward(self, x):
        a = torch.relu(self.a(x))
        x = self.c(torch.cat([a, torch.relu(self.b(a))], 1))
        b, _, h, w = x.shape
        x = self.norm(x.permute(0, 2, 3, 1).reshape(b, h, w, 2, 3)).reshape(b, h, w, 6).permute(0, 3, 1, 2)
        return self.out(self.shuffle(self.d(x)).mean((2, 3)))


def test_concatenation_groups_and_partial_norms():
    torch.manual_seed(0)
    model = Odd()
    spec = spec_for(model, torch.randn(2, 3, 8, 8))
    text = {n: {a.axis: str(a.layout) for a in axes} for n, axes in spec.tensors.items()}
    assert text["c.weight"][1] == "a.weight/0 * a.weight/0.1 + a.weight/0 * b.weight/0"
    assert text["b.weight"] == {0: "a.weight/0 * b.weight/0", 1: "a.weight/0.1"}  # a filter sees its group's channels
    assert spec.parents("a.weight/0.1") == ("a.weight/0",)
    assert spec.shape("b.weight/0") == (4, 3)
    assert text["norm.weight"] == {0: "c.weight/0.1"}
    assert spec.parents("c.weight/0.1") == ()
    assert text["d.weight"][0] == "d.weight/0 * 4"
    assert text["out.weight"] == {1: "d.weight/0"}


def test_what_the_rules_do_not_know_is_pinned_and_said():
    class Sorter(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.linalg.svdvals(self.a(x).reshape(-1, 2, 3)).repeat(1, 3))

    spec = spec_for(Sorter(), torch.randn(2, 4))
    assert "a.weight" not in spec.tensors
    assert any("svd" in note for note in spec.notes)


def test_training_mode_and_parameters_are_left_alone():
    model = zoo.VGG()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    spec_for(model, torch.randn(2, 3, 8, 8))
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_spec_that_is_no_symmetry_is_refused_by_group():
    model = zoo.build("mlp")
    data = json.loads(named_spec("mlp", model).to_json())
    data["tensors"]["layers.1.weight"] = [a for a in data["tensors"]["layers.1.weight"] if a[0] == 0]
    text = json.dumps(data)
    with pytest.raises(BadInput, match=r"does not preserve the function.*groups that break it: layers.0"):
        check_spec(model, PermutationSpec.from_json(text), torch.randn(4, 6))


def test_a_wrong_rule_is_caught_and_the_operation_named(monkeypatch):
    from fastmerge.structure import _rules, _rules_arithmetic

    monkeypatch.setitem(_rules.RULES, "aten.cumsum", _rules_arithmetic._same)  # claims that order does not matter

    class Cumulative(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x).cumsum(1))

    with pytest.raises(BadInput, match=r"goes wrong at aten\.cumsum"):
        spec_for(Cumulative(), torch.randn(3, 4))


def test_models_that_can_not_be_traced_say_so():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(BadInput, match="can not be traced"):
        spec_for(Branching(), torch.randn(2, 3))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_tensors_in_a_files_order_are_recognised_too(name):
    """Checkpoint files sort names: a bias comes before its weight, classifier before features, layers.10 before layers.2."""
    model, (_, _, architecture, options) = zoo.build(name), zoo.ZOO[name]
    state = model.state_dict()
    spec = named_spec(None, {n: state[n] for n in sorted(state)}, **options)
    assert spec.signature() == named_spec(architecture, model, **options).signature()


def test_layers_are_ordered_by_their_numbers():
    state = {
        f"layers.{i}.{n}": torch.zeros(7, 7) if n == "weight" else torch.zeros(7)
        for i in range(12)
        for n in ("weight", "bias")
    }
    spec = named_spec("mlp", {n: state[n] for n in sorted(state)})
    text = {n: {a.axis: str(a.layout) for a in axes} for n, axes in spec.tensors.items()}
    assert text["layers.10.weight"] == {0: "layers.10", 1: "layers.9"}
    assert text["layers.2.weight"] == {0: "layers.2", 1: "layers.1"}
    assert text["layers.11.weight"] == {1: "layers.10"}

"""Partial zip: a shared trunk, both networks' own heads."""

import pytest
import torch
import zoo
from test_mudsc import copies
from torch import nn

from fastmerge.errors import BadInput
from fastmerge.structure import activation_statistics, mudsc, partial_zip, split
from fastmerge.structure.zipping import Zipper

CUTS = [
    ("vgg", "features.2"),  # a pooling layer: units are the convolution's before it
    ("vgg_bn", "features.5"),
    ("resnet_basic", "layer2"),
    ("resnet_bottleneck", "layer1.1"),
    ("resnet_basic_gn", "layer3"),
    ("vit", "blocks.0"),
    ("swin", "layers.0"),
    ("convnext", "stages.0.blocks.1"),
]


@pytest.mark.filterwarnings("ignore:the merged network has BatchNorm:UserWarning")
@pytest.mark.parametrize(("name", "stop_at"), [c for c in CUTS if c[0] not in ("convnext",)])
def test_a_permuted_copy_has_the_originals_outputs_from_both_heads(name, stop_at):
    model, other, spec, x = copies(name)
    result = partial_zip([model, other], stop_at, spec, sweeps=2)
    with torch.no_grad():
        want = model(x)
        for got in result.model(x):
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "stop_at"), CUTS)
def test_trunk_and_head_are_the_network(name, stop_at):
    model, _, _, x = copies(name)
    trunk, head = split(model, stop_at)
    with torch.no_grad():
        torch.testing.assert_close(head(trunk(x)), model(x))
    assert trunk.get_submodule(stop_at) is model.get_submodule(stop_at)


def test_heads_are_the_networks_own_and_the_trunk_is_the_zip():
    """Two unrelated networks: after the cut nothing is merged, before it what mudsc would zip from the same tensors."""
    models = [zoo.build("vgg", seed) for seed in (1, 2)]
    batches = [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    result = partial_zip(models, "features.3", activations=batches)
    spec = result.alignment.spec
    assert set(spec.tensors) == {"features.0.weight", "features.0.bias", "features.3.weight", "features.3.bias"}
    table = Zipper(spec)
    states = [m.state_dict() for m in models]
    for n in spec.tensors:
        want = sum(table.zipped(n, s[n], m, result.alignment.labels) / 2 for m, s in enumerate(states))
        torch.testing.assert_close(result.model.trunk.state_dict()[n], want)
    x = batches[0]
    with torch.no_grad():
        shared = result.model.trunk(x)
        for m, (model, got) in enumerate(zip(models, result.model(x), strict=True)):
            label = result.alignment.labels["features.3",][m * 12 : (m + 1) * 12]
            rest = nn.Sequential(*list(model.features)[4:], nn.Flatten(), model.classifier)
            torch.testing.assert_close(got, rest(shared[:, label]))
    same = activation_statistics(models, spec, batches, within=True)
    again = partial_zip(models, "features.3", activations=same)
    assert torch.equal(again.alignment.labels["features.3",], result.alignment.labels["features.3",])


def test_later_cuts_share_more_and_the_last_is_the_whole_zip():
    models = [zoo.build("mlp", seed) for seed in (1, 2)]
    shared = [len(partial_zip(models, f"layers.{i}").alignment.spec.tensors) for i in range(2)]
    assert shared == [2, 4]
    whole = mudsc(models, match="zip")
    assert len(whole.alignment.spec.tensors) == 5  # the last bias does not move


def test_batchnorm_of_the_trunk_is_reestimated():
    models = [zoo.build("vgg_bn", seed) for seed in (1, 2)]
    batches = [torch.randn(32, 3, 8, 8) for _ in range(2)]
    with pytest.warns(UserWarning, match="Pass reset=batches"):
        partial_zip(models, "features.2")
    result = partial_zip(models, "features.2", reset=batches)
    first = result.model.trunk.get_submodule("features.0")(torch.cat(batches))
    got = result.model.trunk.state_dict()["features.1.running_mean"]
    torch.testing.assert_close(got, first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert not result.model.training


def test_cuts_that_can_not_be_made_are_named():
    models = [zoo.build("resnet_basic", seed) for seed in (1, 2)]
    with pytest.raises(BadInput, match=r"(?s)'layer9' is not a module.*layer4"):
        partial_zip(models, "layer9")
    with pytest.raises(BadInput, match=r"values go round stop_at='layer1\.0\.conv1'"):
        partial_zip(models, "layer1.0.conv1")
    with pytest.raises(BadInput, match=r"two nn\.Modules"):
        partial_zip([models[0].state_dict()] * 2, "layer1")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])

        def forward(self, x):
            return self.layers[1](self.layers[0](self.layers[0](x)))

    with pytest.raises(BadInput, match="called 2 times"):
        partial_zip([Twice(), Twice()], "layers.0", "mlp")

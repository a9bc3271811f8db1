"""fm.mudsc: merged copies equal the original, activations, BatchNorm, zip."""

import warnings

import pytest
import torch
import zoo
from torch import nn

from fastmerge.errors import BadInput
from fastmerge.structure import ZipAlignment, activation_statistics, align, mudsc, named_spec, reset_batchnorm
from fastmerge.structure.solve import matched_columns
from fastmerge.structure.units import units


def copies(name, seed=7):
    """A network and a permuted copy of it."""
    model, (_, inputs, architecture, options) = zoo.build(name), zoo.ZOO[name]
    spec = named_spec(architecture, model, **options)
    other = zoo.build(name)
    other.load_state_dict(spec.permute_state(model.state_dict(), spec.random(torch.Generator().manual_seed(seed))))
    return model, other, spec, inputs()


@pytest.mark.parametrize("name", zoo.ZOO)
def test_merging_a_permuted_copy_gives_the_original(name):
    model, other, spec, x = copies(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # averaged BatchNorm statistics are right here
        result = mudsc([model, other], spec)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), atol=1e-5, rtol=1e-5)
    for n, t in model.state_dict().items():
        torch.testing.assert_close(result.state[n], t, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "vgg_bn", "resnet_basic_gn", "vit", "bert", "mistral", "convnext", "swin"])
def test_activations_alone_recover_a_permuted_copy(name):
    model, other, spec, x = copies(name)
    g = torch.Generator().manual_seed(3)
    batches = (
        [torch.randn(64, *x.shape[1:], generator=g) for _ in range(2)]
        if x.is_floating_point()
        else [torch.randint(0, 20, (64, 7), generator=g) for _ in range(2)]
    )
    found = align([model, other], spec, activations=batches, weight_share=0.5)
    back = found.apply(other.state_dict(), 1)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in back.items())
    assert found.weight_share == 0.5
    only = align([model, other], spec, activations=batches, preset="activation")
    shown = activation_statistics([model, other], spec, batches).similarity(1)
    for signature, matrix in shown.items():  # units that never fire are all alike: any order of them is as good
        columns = matched_columns(spec, signature, only.perms[1])
        matched = matrix.gather(1, columns[:, None])[:, 0]
        assert ((matched > 0.999) | (matrix.abs().amax(1) < 1e-6)).all(), signature


def test_activation_statistics_equal_the_two_pass_formula_and_hooks_go():
    model, other, spec, _ = copies("mlp")
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 6, generator=g) + 2 for n in (10, 33, 4)]
    stats = activation_statistics([model, other], spec, batches, within=True)
    x = torch.cat(batches)
    with torch.no_grad():
        a, b = (torch.relu(m.layers[0](x)).T for m in (model, other))
    want = torch.corrcoef(torch.cat([a, b]).double()).nan_to_num(0.0)
    torch.testing.assert_close(stats.similarity(1)[("layers.0",)].double(), want[:16, 16:], atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.similarity(0, anchor=0)[("layers.0",)].double(), want[:16, :16], atol=1e-5, rtol=0)
    cosine = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    torch.testing.assert_close(stats.similarity(1, "cosine")[("layers.0",)], cosine, atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        activation_statistics([model, other], spec, [torch.randn(3, 7)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_weight_share_is_searched_by_a_score():
    model, other, spec, _ = copies("mlp")
    tried = []

    def score(found):
        tried.append(found.weight_share)
        return -abs(found.weight_share - 0.3)

    batches = [torch.randn(50, 6)]
    found = align([model, other], spec, activations=batches, weight_share=[0.1, 0.3, 0.9], score=score)
    assert tried == [0.1, 0.3, 0.9]
    assert found.weight_share == 0.3
    with pytest.raises(BadInput, match="give score"):
        align([model, other], spec, activations=batches, weight_share=[0.1, 0.3])
    with pytest.raises(BadInput, match=r"activations need nn\.Modules"):
        align([model.state_dict(), other.state_dict()], spec, activations=batches)


def test_batchnorm_is_reestimated_and_the_warning_says_when_not():
    model, other, spec, _ = copies("vgg_bn")
    with torch.no_grad():
        for t in other.parameters():
            t.add_(0.2 * torch.randn_like(t))
    batches = [torch.randn(32, 3, 8, 8) for _ in range(3)]
    with pytest.warns(UserWarning, match="reset_batchnorm"):
        mudsc([model, other], spec)
    result = mudsc([model, other], spec, reset_batchnorm=iter(batches))
    first = result.model.features[0](torch.cat(batches))
    torch.testing.assert_close(result.state["features.1.running_mean"], first.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert result.state["features.1.num_batches_tracked"].item() == 3
    assert result.state["features.1.num_batches_tracked"].dtype == torch.int64
    norm = result.model.features[1]
    assert norm.momentum == 0.1
    assert not norm.training
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with pytest.raises(BadInput, match="no batch"):
        reset_batchnorm(result.model, [])
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


def test_weights_and_three_models():
    g = torch.Generator().manual_seed(0)
    states = [
        {"layers.0.weight": torch.randn(4, 3, generator=g), "layers.1.weight": torch.randn(2, 4, generator=g)}
        for _ in range(3)
    ]
    result = mudsc(states, weights=[1, 2, 5])
    spec = result.alignment.spec
    moved = [spec.permute_state(s, p) for s, p in zip(states, result.alignment.perms, strict=True)]
    for n in states[0]:
        want = sum(w * m[n] for w, m in zip((0.125, 0.25, 0.625), moved, strict=True))
        torch.testing.assert_close(result.state[n], want)
    with pytest.raises(BadInput, match="2 entries for 3 models"):
        mudsc(states, weights=[1, 2])


@pytest.mark.parametrize("name", ["mlp", "vgg", "vit", "swin", "resnet_basic_gn", "gpt2", "mistral", "convnext"])
def test_zipping_a_permuted_copy_gives_the_original_function(name):
    """Each feature's best partner is its copy, so a zip merges exactly those."""
    model, other, spec, x = copies(name)
    result = mudsc([model, other], spec, match="zip", sweeps=3)
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), model(x), atol=1e-3, rtol=1e-3)


def test_zip_of_one_layer_is_the_published_merge(tmp_path):
    """merge and unmerge matrices applied by hand to both sides of one hidden layer."""
    from fastmerge.ops import zip_match

    g = torch.Generator().manual_seed(1)
    states = [
        {
            "a.weight": torch.randn(12, 5, generator=g),
            "a.bias": torch.randn(12, generator=g),
            "b.weight": torch.randn(3, 12, generator=g),
        }
        for _ in range(2)
    ]
    result = mudsc(states, match="zip")
    x = torch.cat([torch.cat([s["a.weight"], s["a.bias"][:, None], s["b.weight"].T], 1) for s in states])
    match = zip_match(torch.corrcoef(x))
    assert torch.equal(result.alignment.labels[("a",)], match.label)
    merge, unmerge = match.merge.split(12), match.unmerge.split(12)
    want = sum(2 * merge[m].T @ states[m]["a.weight"] for m in (0, 1)) / 2
    torch.testing.assert_close(result.state["a.weight"], want)
    want = sum(states[m]["b.weight"] @ unmerge[m] for m in (0, 1)) / 2
    torch.testing.assert_close(result.state["b.weight"], want)
    result.alignment.save(tmp_path / "zip.npz")
    again = ZipAlignment.load(tmp_path / "zip.npz").merge(states)
    assert all(torch.equal(again[n], t) for n, t in result.state.items())


def test_zip_with_activations_and_its_limits():
    model, other, spec, _ = copies("mlp")
    batches = [torch.randn(200, 6)]
    found = align([model, other], spec, activations=batches, match="zip")
    assert found.trace[1][0].accepted
    assert {s for u in units(spec) for s in u.signatures} == set(found.labels)
    with pytest.raises(BadInput, match="two models"):
        align([model, other, model], spec, match="zip")


def test_published_merge_scale_and_counters_only_on_request():
    model, other, spec, _ = copies("vgg_bn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = mudsc([model.state_dict(), other.state_dict()], spec).state
        theirs = mudsc([model.state_dict(), other.state_dict()], spec, reference_bugs=True).state
    ratio = theirs["features.0.weight"] / ours["features.0.weight"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2 / (2 + 1e-5)), atol=3e-7, rtol=0)
    assert theirs["features.1.num_batches_tracked"].dtype == torch.float32
    assert ours["features.1.num_batches_tracked"].dtype == torch.int64
    assert isinstance(mudsc([model, other], spec, reset_batchnorm=False).model, nn.Module)

"""Alignment: permuted copies come back exactly, the objective never falls, bad input is named."""

import io

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.errors import BadInput
from fastmerge.structure import Alignment, align, check_spec, named_spec
from fastmerge.structure.units import units
from fastmerge.structure.zipping import ZipAlignment


def permuted(model, spec, seed=7):
    """The model's tensors, the same permuted, and the permutations that bring them back."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    perms = spec.random(torch.Generator().manual_seed(seed))
    return state, spec.permute_state(state, perms), spec.inverse(perms)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_permuted_copy_is_recovered_exactly(name):
    model, (_, _, architecture, options) = zoo.build(name), zoo.ZOO[name]
    spec = named_spec(architecture, model, **options)
    state, other, back = permuted(model, spec)
    found = align([state, other], spec)
    for group, perm in back.items():
        assert torch.equal(found.perms[1][group], perm), group
    assert all(torch.equal(t, state[n]) for n, t in found.apply(other, 1).items())
    assert found.objective == pytest.approx(1.0, abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["mlp", "swin", "mistral", "resnet_basic_gn"]))
def test_inverse_and_compose(seed, name):
    model, (_, _, architecture, options) = zoo.build(name), zoo.ZOO[name]
    spec = named_spec(architecture, model, **options)
    g = torch.Generator().manual_seed(seed)
    a, b = spec.random(g), spec.random(g)
    state = model.state_dict()
    moved = spec.permute_state(state, a)
    assert all(torch.equal(v, state[k]) for k, v in spec.permute_state(moved, spec.inverse(a)).items())
    twice, once = spec.permute_state(moved, b), spec.permute_state(state, spec.compose(a, b))
    assert all(torch.equal(v, once[k]) for k, v in twice.items())


@pytest.mark.parametrize("order", ["topological", "random"])
@pytest.mark.parametrize("similarity", ["pearson", "cosine", "dot"])
def test_accepted_sweeps_never_lower_the_objective(order, similarity):
    a, b = (zoo.build("vit", seed).state_dict() for seed in (1, 2))
    found = align([a, b], named_spec("vit", a, heads=3), order=order, similarity=similarity)
    accepted = [s.objective for s in found.trace[1] if s.accepted]
    assert accepted
    assert accepted == sorted(accepted)
    assert found.objective == accepted[-1]
    again = align([a, b], named_spec("vit", a, heads=3), order=order, similarity=similarity)
    assert all(torch.equal(p, again.perms[1][g]) for g, p in found.perms[1].items())


def test_similarity_of_a_linear_layer_is_the_papers():
    """Matching one hidden layer by hand: Pearson over rows of fc1, its bias and columns of fc2."""
    from scipy.optimize import linear_sum_assignment

    a, b = ({k: v.double() for k, v in zoo.MLP((6, 16, 5)).state_dict().items()} for _ in range(2))
    found = align([a, b], order="random")
    x, y = (torch.cat([s["layers.0.weight"], s["layers.0.bias"][:, None], s["layers.1.weight"].T], 1) for s in (a, b))
    s = torch.corrcoef(torch.cat([x, y]))[:16, 16:]
    _, columns = linear_sum_assignment(s.numpy(), maximize=True)
    assert found.perms[1]["layers.0"].tolist() == columns.tolist()
    assert found.objective == pytest.approx(float(s[range(16), columns].mean()), abs=1e-6)


def test_incremental_products_equal_fresh_ones():
    from fastmerge.structure.features import WeightFeatures

    a, b = (zoo.build("vit", seed).state_dict() for seed in (1, 2))
    spec = named_spec("vit", a, heads=3)
    g = torch.Generator().manual_seed(0)
    perms = spec.identity()
    for unit in units(spec):
        kept = WeightFeatures(spec, unit, a, b, "pearson")
        for step in range(4):
            if step == 1:  # few columns move
                perms = {k: p.clone() for k, p in perms.items()}
                perms["stream"][[0, 5]] = perms["stream"][[5, 0]]
            if step == 2:  # all of them
                perms = spec.random(g)
            fresh = WeightFeatures(spec, unit, a, b, "pearson").similarity(perms)
            for s, matrix in kept.similarity(perms).items():
                torch.testing.assert_close(matrix, fresh[s], atol=2e-6, rtol=0)


def test_three_models_meet_in_the_frame_of_the_first():
    model = zoo.build("resnet_basic")
    spec = named_spec("resnet_basic", model)
    state, one, _ = permuted(model, spec, 1)
    _, two, _ = permuted(model, spec, 2)
    found = align([state, one, two], spec)
    assert found.perms[0] == {}
    for i, other in ((1, one), (2, two)):
        assert all(torch.equal(t, state[n]) for n, t in found.apply(other, i).items())


def test_published_head_matching_breaks_the_function_ours_does_not():
    model = zoo.build("vit")
    spec = named_spec("vit", model)
    _, other, _ = permuted(model, spec)
    noisy = {k: v + 0.3 * torch.randn_like(v) for k, v in other.items()}
    apart = align([model.state_dict(), noisy], spec, reference_bugs=True)
    assert check_spec(model, spec, zoo.images()) < 1e-4
    with pytest.raises(BadInput, match="does not preserve the function"):
        check_spec(model, apart.spec, zoo.images())
    groups = [g for g in apart.spec.groups if "@" in g]
    assert len(groups) == 4  # two blocks, heads of qk and of v


def test_saved_permutations_apply_again(tmp_path):
    model = zoo.build("swin")
    spec = named_spec("swin", model)
    state, other, _ = permuted(model, spec)
    align([state, other], spec).save(tmp_path / "perms.npz")
    loaded = Alignment.load(tmp_path / "perms.npz")
    assert all(torch.equal(t, state[n]) for n, t in loaded.apply(other, 1).items())
    assert loaded.trace[1][0].accepted


def test_files_that_hold_no_alignment_are_named(tmp_path):
    file = tmp_path / "bad.npz"
    archive = io.BytesIO()
    np.savez(archive, about=np.array('{"models": 1, "spec": {"groups": {}, "tensors": {}}}'))
    for content in (b"", b"not this", b"PK\x03\x04 cut", archive.getvalue(), archive.getvalue()[:-30]):
        file.write_bytes(content)
        for load, what in ((Alignment.load, "permutations"), (ZipAlignment.load, "zip labels")):
            with pytest.raises(BadInput, match=f"not a file of {what}") as caught:
                load(file)
            assert caught.value.where == str(file)


def test_bad_input_is_named():
    a = zoo.build("mlp").state_dict()
    with pytest.raises(BadInput, match="two models"):
        align([a])
    with pytest.raises(BadInput, match="needs activations"):
        align([a, a], weight_share=0.5)
    with pytest.raises(BadInput, match="order must be one of"):
        align([a, a], order="sideways")
    with pytest.raises(BadInput, match=r"preset must be one of .*git-rebasin.*did you mean"):
        align([a, a], preset="git-rebase")
    with pytest.raises(BadInput, match=r"(?s)proj.weight: axis 1 of size 24 does not fit.*'vit'.*heads="):
        named_spec("vit", zoo.build("vit").state_dict(), heads=5)
    with pytest.raises(BadInput, match=r"(?s)unknown architecture 'mlpp'.*did you mean 'mlp'"):
        align([a, a], "mlpp")
    with pytest.raises(BadInput, match=r"models\[1\] has no tensor 'layers.2.weight'"):
        align([a, {k: v for k, v in a.items() if k != "layers.2.weight"}])
    with pytest.raises(BadInput, match=r"models\[1\]: layers.0.bias holds NaN"):
        align([a, {**a, "layers.0.bias": torch.full((16,), float("nan"))}])
    with pytest.raises(BadInput, match="needs heads"):
        align([zoo.build("vit").state_dict()] * 2)
    with pytest.raises(BadInput, match="no shipped architecture"):
        align([{"x": torch.zeros(3)}] * 2)


@pytest.mark.parametrize("patience", [1, 3])
def test_sweeps_that_do_not_improve_are_undone_and_end_the_search(patience):
    a, b = (zoo.build("resnet_basic", seed).state_dict() for seed in (1, 2))
    spec = named_spec("resnet_basic", a)
    found = align([a, b], spec, order="random", patience=patience)
    trace = found.trace[1]
    best = max(k for k, s in enumerate(trace) if s.accepted)
    undone = len(trace) - 1 - best
    assert undone <= patience
    assert undone == patience or trace[-1].changed == 0
    assert found.objective == pytest.approx(sum(found.values[1].values()) / len(found.values[1]))
    stopped = align([a, b], spec, order="random", patience=patience, sweeps=best + 1)
    assert all(
        torch.equal(p, stopped.perms[1][g]) for g, p in found.perms[1].items()
    )  # the best sweep's, not the last's


def test_a_restricted_spec_keeps_its_tensors_and_their_groups():
    model = zoo.build("vit")
    spec = named_spec("vit", model)
    part = spec.restricted(n for n in spec.tensors if n.startswith("blocks.0.attn"))
    assert set(part.groups) == {"stream", "blocks.0.heads", "blocks.0.qk", "blocks.0.v"}
    assert set(part.tensors) == {n for n in spec.tensors if n.startswith("blocks.0.attn")}
    assert part.permute_state(model.state_dict(), part.identity()).keys() == model.state_dict().keys()

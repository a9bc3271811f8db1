"""NaN and Inf that a merge goes on with: every method finishes, shows them where they count, and nowhere else."""

import pytest
import torch
from checkpoints import load, save
from checks import assert_same_bits
from fake_device import FakeDevice

import fastmerge as fm
from fastmerge.device import use_devices
from fastmerge.errors import BadInput
from fastmerge.methods import REQUIRED, get, names

SHAPES = {"a.weight": (40, 31), "b.weight": (411, 643), "c.bias": (64,)}  # the second one is streamed in chunks
BAD, AT = "b.weight", (3, 5)
WHOLE_MODEL = [("ties", {"density": 0.4, "scope": "model"}), ("fr", {}), ("fr", {"lambda_policy": "align"})]
VARIANTS = {
    "nuslerp": [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "model_stock": [{}, {"filter_wise": True}],
    "sce": [{}, {"select_topk": 0.3}],
    "slerp": [{"t": 0.3}],
    "nearswap": [{"t": 0.01}],
    "fr": [{"scope": "tensor"}, {"lambda_policy": "constant"}, {"preset": "lm"}, {"preset": "llm"}],
    "ties": [{"density": 0.4}],
    "breadcrumbs": [{"density": 0.4}, {"density": 0.4, "rescale": True}],
    "breadcrumbs_ties": [{"density": 0.4}],
    **{
        n: [{"density": 0.4}, {"density": 0.4, "rescale_norm": "density"}]
        for n in ("dare_linear", "dare_ties", "della")
    },
    "della_linear": [{"density": 0.4}],
    "multislerp": [{}, {"normalize_weights": False}],
}
CASES = [
    (name, options)
    for name in names()
    if not get(name).needs_data and name not in ("mudsc", "free")  # refused below; tests/methods/test_free.py
    for options in VARIANTS.get(name, [{}])
]
EVERYWHERE = {"fr", "karcher", "multislerp", "sce", "slerp"}  # one number of theirs is found on the whole tensor


@pytest.fixture(scope="module")
def states():
    g = torch.Generator().manual_seed(3)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    return [base, *({n: t + 0.05 * torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(3))]


@pytest.fixture(scope="module")
def folders(states, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(save(folder / str(i), s)) for i, s in enumerate(states)]


def spoiled(state, value):
    bad = {n: t.clone() for n, t in state.items()}
    bad[BAD][AT] = value
    return bad


def arguments(name, options):
    method = get(name)
    weight = (
        {"weight": 0.5} if "weight" in method.parameters and method.parameters["weight"].default is REQUIRED else {}
    )
    return min(method.models[1] or 3, 3), method.base != "ignored", {**weight, **options}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize(("name", "options"), [*CASES, *WHOLE_MODEL], ids=str)
def test_a_merge_that_warns_finishes_and_other_tensors_do_not_change(name, options, value, states, folders, tmp_path):
    count, takes_base, given = arguments(name, options)
    base = states[0] if takes_base else None
    clean = fm.merge(name, base, states[1 : 1 + count], **given)
    bad = spoiled(states[1], value)
    got = fm.merge(name, base, [bad, *states[2 : 1 + count]], nan="warn", **given)
    for n in SHAPES:
        if (name, options) in WHOLE_MODEL:  # another threshold, other coefficients
            assert n == BAD or got[n].isfinite().all()
        elif n != BAD:
            assert_same_bits(got[n], clean[n], n)

    # From files, through chunks, after a run that stopped there: the same.
    spoilt = str(save(tmp_path / "bad", bad))
    recipe = fm.Recipe.from_call(name, folders[0] if takes_base else None, [spoilt, *folders[2 : 1 + count]], given)
    with pytest.raises(BadInput, match=f"{BAD}.*has NaN or Inf"):
        fm.run(recipe, tmp_path / "out", threads=2)
    report = fm.run(recipe, tmp_path / "out", threads=2, resume=True, nan="warn")
    assert list(report.nonfinite) == [f"{spoilt}: {BAD}"]
    less = 60_000_000 if get(name).memory_pass is not None else 4_000_000
    few = fm.run(recipe, tmp_path / "one", threads=1, nan="allow", max_memory=less)
    assert few.chunk_elements < states[0][BAD].numel() or get(name).memory_pass is not None
    pieces, one = load(tmp_path / "out"), load(tmp_path / "one")
    for n in SHAPES:
        assert_same_bits(pieces[n], got[n], n)
        assert_same_bits(one[n], got[n], n)

    lost = ~got[BAD].isfinite()
    if name in EVERYWHERE and options.get("preset") not in ("lm",):
        assert lost.all()
    elif name in ("linear", "task_arithmetic", "passthrough", "ties"):
        assert lost.nonzero().tolist() == [list(AT)]


@pytest.mark.parametrize("name", ["sce", "slerp"])
def test_a_device_gives_the_same(name, states, folders, tmp_path):
    count, _, given = arguments(name, VARIANTS[name][0])
    spoilt = str(save(tmp_path / "bad", spoiled(states[1], float("nan"))))
    recipe = fm.Recipe.from_call(name, folders[0], [spoilt, *folders[2 : 1 + count]], given)
    fm.run(recipe, tmp_path / "cpu", device="cpu", nan="warn")
    device = FakeDevice()
    with use_devices([device]):
        fm.run(recipe, tmp_path / "gpu", device="cuda", nan="warn")
    assert device.problems == []
    want, got = load(tmp_path / "cpu"), load(tmp_path / "gpu")
    for n in SHAPES:
        assert_same_bits(got[n], want[n], n)
    assert got[BAD].isnan().all()


def test_a_row_or_a_column_is_lost_where_lines_are_merged(states):
    models = [spoiled(states[1], float("nan")), states[2]]
    for options, lines in (({}, lambda x: x), ({"nuslerp_row_wise": True}, lambda x: x.T)):
        merged = fm.merge("nuslerp", states[0], models, nan="warn", weight=0.5, nuslerp_flatten=False, **options)[BAD]
        rows = lines(merged).isnan()
        assert rows.any(1).nonzero().tolist() == [[AT[0] if not options else AT[1]]]
        assert rows.any(1).tolist() == rows.all(1).tolist()


def test_sce_has_no_weights_where_a_selected_delta_is_no_number(states):
    base, a, b = torch.zeros(3), torch.tensor([1.0, float("nan"), 0.0]), torch.tensor([2.0, 1.0, 0.0])

    def merged(dtype=None, **options):
        return fm.merge("sce", {"w": base}, [{"w": a}, {"w": b}], nan="warn", dtype=dtype, **options)["w"]

    assert merged().isnan().all()
    assert merged(torch.bfloat16).isnan().all()
    assert merged(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(merged(select_topk=0.0), base)  # nothing is selected, nothing is weighed


def test_alignment_says_that_it_can_not_before_anything_is_written(tmp_path):
    import zoo

    state = {n: t.clone() for n, t in zoo.build("mlp").state_dict().items()}
    folders = [save(tmp_path / "a", state)]
    name = next(n for n, t in state.items() if t.ndim == 2)
    state[name][0, 0] = float("nan")
    folders.append(save(tmp_path / "b", state))
    with pytest.raises(BadInput, match=f"{name} holds NaN or Inf"):
        fm.run(fm.Recipe.from_call("mudsc", None, list(map(str, folders)), {}), tmp_path / "out", nan="warn")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(("name", "options"), CASES[::2])
def test_found_on_a_gpu_at_the_end_of_the_merge(states, name, options, monkeypatch):
    """There the host looks once; here the CPU's tensors wait as a GPU's do."""
    monkeypatch.setattr("fastmerge.job._waits", lambda chunk: True)
    count, with_base, options = arguments(name, options)
    base, others = states[0] if with_base else None, states[2 : 1 + count]
    fm.merge(name, base, states[1 : 1 + count], **options)
    models = [spoiled(states[1], float("-inf")), *others]
    with pytest.raises(BadInput, match=r"'b.weight' has NaN or Inf \(first at flat index 1934\)"):
        fm.merge(name, base, models, **options)
    fm.merge(name, base, models, nan="allow", **options)
    if with_base:
        with pytest.raises(BadInput, match="has NaN or Inf"):
            fm.merge(name, spoiled(base, float("nan")), states[1 : 1 + count], **options)


def test_the_largest_numbers_are_finite(states, monkeypatch):
    monkeypatch.setattr("fastmerge.job._waits", lambda chunk: True)
    models = [{n: t.half() for n, t in state.items()} for state in states[:2]]
    models[0][BAD][0, 0], models[0][BAD][0, 1] = 65504, -65504
    assert set(fm.merge("linear", None, models, weight=0.25)) == set(SHAPES)

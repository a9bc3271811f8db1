"""Candidates on disk: streaming, adapters, damage, duplicates, norms kept, memory that does not grow with their number."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastmerge import fw
from fastmerge.errors import BadInput

SHAPES = {"a.weight": (40, 30), "a.bias": (40,), "b.weight": (5, 40)}


def states(count, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    many = [{n: (t + 0.3 * torch.randn(t.shape, generator=g)).to(dtype) for n, t in base.items()} for _ in range(count)]
    return {n: t.to(dtype) for n, t in base.items()}, many


def gradient(state):
    g = torch.Generator().manual_seed(5)
    return {n: state[n] - torch.randn(state[n].shape, generator=g) for n in SHAPES if n in state}


def folder(path, state):
    path.mkdir()
    save_file({n: t.contiguous() for n, t in state.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_files_give_the_bits_of_state_dicts(tmp_path, dtype, metric):
    base, many = states(6, dtype)
    options = {"metric": metric, "iterations": 3, "pool_init": True, "norm_cache": False}
    want = fw.frank_wolfe(base, many, gradient, **options)
    paths = [folder(tmp_path / f"m{k}", c) for k, c in enumerate(many)]
    got = fw.frank_wolfe(folder(tmp_path / "base", base), paths, gradient, **options)
    # A file has an order of its own.
    for row, wanted in zip(got.choices, want.choices, strict=True):
        assert dict(zip(got.trace.layers, row, strict=True)) == dict(zip(SHAPES, wanted, strict=True))
    for n in SHAPES:
        assert torch.equal(got.state_dict[n], want.state_dict[n])
        assert got.state_dict[n].dtype == dtype


def test_other_inner_merges_stream_files_too(tmp_path):
    base, many = states(3)
    options = {"iterations": 2, "inner_parameters": {"weight": 0.5, "normalize": True}}
    want = fw.frank_wolfe(base, many, gradient, **options)
    paths = [folder(tmp_path / f"m{k}", c) for k, c in enumerate(many)]
    got = fw.frank_wolfe(folder(tmp_path / "base", base), paths, gradient, **options)
    for n in SHAPES:
        assert torch.equal(got.state_dict[n], want.state_dict[n])


def test_norms_are_kept_on_disk_and_only_for_the_same_files(tmp_path, monkeypatch):
    base, many = states(3)
    paths = [folder(tmp_path / f"m{k}", c) for k, c in enumerate(many)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    want = fw.frank_wolfe(base, paths, gradient, metric="cosine", iterations=2)
    files = sorted((tmp_path / "cache/fastmerge/norms").glob("*.json"))
    assert len(files) == 3
    # A doctored cache shows that the second run uses it.
    for file in files:
        known = json.loads(file.read_text())
        norm = float.fromhex(known["a.bias"])
        assert any(norm == pytest.approx(float(c["a.bias"].square().sum()), rel=1e-5) for c in many)
        file.write_text(json.dumps({n: (4 * float.fromhex(v)).hex() for n, v in known.items()}))
    halved = fw.frank_wolfe(base, paths, gradient, metric="cosine", iterations=2)
    np.testing.assert_allclose(
        np.array(halved.trace.iterations[0].scores) * 2, want.trace.iterations[0].scores, rtol=1e-12
    )
    # A changed file is another file; a damaged cache is no error.
    save_file({n: 2 * t for n, t in many[0].items()}, paths[0] / "model.safetensors")
    for file in files:
        file.write_text("{")
    fresh = fw.frank_wolfe(base, paths, gradient, metric="cosine", iterations=1, init="base")
    memory = fw.frank_wolfe(
        base, [{n: 2 * t for n, t in many[0].items()}, *many[1:]], gradient, metric="cosine", iterations=1, init="base"
    )
    assert fresh.trace.iterations[0].scores == memory.trace.iterations[0].scores


def test_damaged_candidates_are_named(tmp_path):
    base, many = states(2)
    good, bad = folder(tmp_path / "good", many[0]), folder(tmp_path / "bad", many[1])
    raw = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(raw[:-100])
    with pytest.raises(BadInput, match="truncated") as caught:
        fw.frank_wolfe(base, [good, bad], gradient)
    assert str(bad) in str(caught.value)
    many[1]["a.bias"][3] = float("nan")
    save_file(many[1], bad / "model.safetensors")
    with pytest.raises(BadInput, match=r"'a.bias' holds NaN") as caught:
        fw.frank_wolfe(base, [good, bad], gradient, init="base")
    assert str(bad) in str(caught.value)
    with pytest.raises(BadInput, match="no folder or file"):
        fw.frank_wolfe(base, [good, tmp_path / "none"], gradient)


def test_duplicates_are_named(tmp_path):
    base, many = states(3)
    a, b = folder(tmp_path / "a", many[0]), folder(tmp_path / "b", many[1])
    with pytest.raises(BadInput, match="are the same files"):
        fw.frank_wolfe(base, [a, b, a], gradient)
    copy = folder(tmp_path / "copy of a", many[0])
    with pytest.warns(UserWarning, match=r"a' and .*copy of a' hold the same weights"):
        got = fw.frank_wolfe(base, [a, b, copy], gradient, iterations=1)
    assert got.trace.duplicates == [(0, 2)]


def test_missing_tensors_are_the_zero_vertex():
    base, many = states(2)
    del many[1]["a.bias"]
    got = fw.frank_wolfe(
        base, many, lambda s: {"a.bias": torch.ones(40)}, missing="zero", init="base", iterations=1, metric="cosine"
    )
    table = float(many[0]["a.bias"].sum() / many[0]["a.bias"].norm() / 40**0.5)
    assert got.choices == [[None, 0 if table < 0 else 1, None]]
    assert got.trace.iterations[0].scores[1] == pytest.approx(min(table, 0.0), abs=1e-6)
    towards_zero = fw.frank_wolfe(
        base,
        many,
        lambda s: {"a.bias": many[0]["a.bias"]},
        missing="zero",
        init="base",
        iterations=1,
        scale=0.5,
        step_size=1.0,
    )
    assert towards_zero.choices[0][1] == 1
    torch.testing.assert_close(towards_zero.state_dict["a.bias"], base["a.bias"] * 0.5)


def adapter(path, rank=2, seed=0, modules=("a",), **config):
    g = torch.Generator().manual_seed(seed)
    path.mkdir()
    tensors = {}
    for module in modules:
        out, width = SHAPES[f"{module}.weight"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, width, generator=g)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank, generator=g)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path, {
        f"{m}.weight": tensors[f"base_model.model.{m}.lora_B.weight"] @ tensors[f"base_model.model.{m}.lora_A.weight"]
        for m in modules
    }


@pytest.mark.parametrize("space", [None, "weights"])
def test_adapters_are_merged_as_products(tmp_path, space):
    base, _ = states(0)
    one, delta = adapter(tmp_path / "one", modules=("a", "b"))
    two, other = adapter(tmp_path / "two", seed=1, use_rslora=True)
    deltas = [
        {"a.weight": 2 * delta["a.weight"], "b.weight": 2 * delta["b.weight"]},  # α/r = 2
        {"a.weight": 4 / 2**0.5 * other["a.weight"], "b.weight": torch.zeros(5, 40)},  # α/√r; no module: zero
    ]
    full = [{n: base[n] + d[n] for n in d} for d in deltas]
    got = fw.frank_wolfe(base, [one, two], gradient, space=space, iterations=3, step_size=1.0)
    plain = {n: base[n] for n in ("a.weight", "b.weight")}
    want = fw.frank_wolfe(plain, full, gradient, iterations=3, step_size=1.0)
    assert got.choices == want.choices
    for n in plain:
        torch.testing.assert_close(got.state_dict[n], want.state_dict[n], rtol=1e-5, atol=1e-5)
    assert torch.equal(got.state_dict["a.bias"], base["a.bias"])  # no adapter touches it
    if space is None:
        # In the space of deltas scores are ⟨g, Δ⟩, an absent module scores 0 and the zero vertex is the base.
        first = got.trace.iterations[0]
        assert got.trace.settings["space"] == "deltas"
        start = {n: base[n] + 0.29 * (deltas[0][n] + deltas[1][n]) for n in plain}
        g = gradient(start)
        for i, n in enumerate(plain):
            table = [float((g[n] * d[n]).sum()) for d in deltas]
            assert first.scores[i] == pytest.approx(min(table), rel=1e-4, abs=1e-3)
            assert first.choices[i] == int(np.argmin(table))
    up = fw.frank_wolfe(
        base, [one], lambda s: {n: deltas[0][n] for n in plain}, zero_if_ascent=True, iterations=1, init=full[0] | {
            "a.bias": base["a.bias"]}, scale=1.0, step_size=0.25,
    )  # fmt: skip
    assert up.choices == [[-1, -1]]
    torch.testing.assert_close(up.state_dict["a.weight"], base["a.weight"] + 0.75 * deltas[0]["a.weight"])


def test_adapter_factors_apart_as_published(tmp_path):
    one, _ = adapter(tmp_path / "one", modules=("a", "b"))
    two, _ = adapter(tmp_path / "two", seed=1)  # lacks b: the zero vertex
    from safetensors.torch import load_file

    first = load_file(one / "adapter_model.safetensors")
    base = {n: torch.zeros_like(t) for n, t in first.items()}
    got = fw.frank_wolfe(
        base, [one, two], lambda s: {n: torch.ones_like(t) for n, t in s.items()}, lora="factors", missing="zero",
        preset="published", pool_init=False, iterations=2,
    )  # fmt: skip
    for name, row in zip(got.trace.layers, zip(*[i.scores for i in got.trace.iterations], strict=True), strict=True):
        assert not any(s != s for s in row), name
    assert all(torch.isfinite(t).all() for t in got.state_dict.values())


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"r": None}, "lacks r or lora_alpha"),
        ({"r": "many"}, "not of numbers"),
        ({"lora_alpha": [1]}, "not of numbers"),
        ({"rank_pattern": {"a": "x"}}, "not of numbers"),
        ({"alpha_pattern": [2]}, "not of numbers"),
    ],
)
def test_bad_adapters_are_named(tmp_path, damage, match):
    base, _ = states(0)
    path, _ = adapter(tmp_path / "x", **damage)
    with pytest.raises(BadInput, match=match):
        fw.frank_wolfe(base, [path], gradient)


def test_adapters_of_another_model_are_named(tmp_path):
    path, _ = adapter(tmp_path / "x")
    with pytest.raises(BadInput, match=r"'a.weight', which the base does not have"):
        fw.frank_wolfe({"b.weight": torch.zeros(5, 40)}, [path], gradient)
    for text, match in (
        ("{", "adapter_config.json is not valid JSON"),
        ("[]", "adapter_config.json is not a JSON obj"),
    ):
        (path / "adapter_config.json").write_text(text)
        with pytest.raises(BadInput, match=match):
            fw.frank_wolfe({"b.weight": torch.zeros(5, 40)}, [path], gradient)


MEMORY = """
    import resource, sys, torch
    from fastmerge import fw
    root = sys.argv[1]
    torch.set_num_threads(2)
    target = torch.linspace(-1, 1, 1 << 18).view(256, -1)
    class Gradient:
        def __call__(self, state):
            self.value = float(sum((t - target).square().sum() for t in state.values())) / 2
            return {n: t - target for n, t in state.items()}
    options = dict(norm_cache=False, metric="cosine", iterations=2)
    for count in map(int, sys.argv[2:]):
        paths = [f"{root}/m{k}" for k in range(1, count + 1)]
        fw.frank_wolfe(f"{root}/m0", paths, Gradient(), **options)
        fw.frank_wolfe_soft(f"{root}/m0", paths, Gradient(), top_k=2, inner_steps=2, **options)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_number_of_candidates(tmp_path):
    g = torch.Generator().manual_seed(0)
    for k in range(65):
        folder(tmp_path / f"m{k}", {n: torch.randn(256, 1 << 10, generator=g).bfloat16() for n in "wxyz"})  # 2 MB each
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), "2", "64"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    few, many = map(float, run.stdout.split())  # the peak so far, after each
    assert many <= 1.05 * few, f"peak {many:.0f} MB with 64 candidates, {few:.0f} MB with 2"


def test_tensors_that_are_not_contiguous_give_the_same_and_leave_no_copies(monkeypatch):
    from fastmerge.fw import oracle

    base, many = states(3)
    strided = [{n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in c.items()} for c in many]
    want = fw.frank_wolfe(base, many, gradient, iterations=2)
    monkeypatch.setattr(oracle, "PIECE", 64)
    pools = []
    monkeypatch.setattr(oracle.Pool, "add_initial", lambda self, _: pools.append(self))
    got = fw.frank_wolfe(base, strided, gradient, iterations=2, pool_init=True)
    assert got.choices == want.choices
    for n in SHAPES:
        assert torch.equal(got.state_dict[n], want.state_dict[n])
    assert pools[0].place("a.weight", 0) is None
    assert pools[0].place("a.bias", 0) is not None

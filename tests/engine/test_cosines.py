"""Lengths and cosines of the models' deltas in the report."""

import json
import math

import pytest
import torch
from checkpoints import near, save, tiny_state
from typer.testing import CliRunner

import fastmerge as fm
from fastmerge.cli import app
from fastmerge.errors import BadInput
from fastmerge.similarity import Cosines

ROOT = math.sqrt(2)


def recipe(tmp_path, method, states, **parameters):
    paths = [str(save(tmp_path / str(i), s)) for i, s in enumerate(states)]
    return fm.Recipe.from_call(method, paths[0], paths[1:], parameters), paths[1:]


def test_by_hand(tmp_path):
    base = {"a": torch.ones(2, 2), "b": torch.zeros(3), "n": torch.arange(3)}
    x = {"a": base["a"] + torch.tensor([[3.0, 0], [0, 0]]), "b": torch.tensor([0, 4.0, 0]), "n": base["n"]}
    y = {"a": base["a"] + torch.tensor([[1.0, 1], [0, 0]]), "b": torch.zeros(3), "n": base["n"]}
    made, paths = recipe(tmp_path, "task_arithmetic", [base, x, y], weight=0.5)
    found = fm.run(made, tmp_path / "out", cosines=True).cosines
    assert (found["of"], found["names"], found["lengths"]) == ("deltas", paths, [5.0, ROOT])
    assert found["matrix"] == [[1.0, pytest.approx(3 / (5 * ROOT))], [pytest.approx(3 / (5 * ROOT)), 1.0]]
    assert set(found["tensors"]) == {"a", "b"}
    assert found["tensors"]["a"]["matrix"][0][1] == pytest.approx(1 / ROOT)
    assert found["tensors"]["b"] == {"models": [0, 1], "lengths": [4.0, 0.0], "matrix": [[1.0, 0.0], [0.0, 0.0]]}
    assert json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())["cosines"] == found


@pytest.mark.parametrize(
    ("method", "count", "of", "parameters"),
    [
        ("model_stock", 3, "deltas", {}),
        ("multislerp", 3, "deltas", {"weight": 1.0}),
        ("nuslerp", 2, "deltas", {"weight": 1.0}),
        ("slerp", 1, "deltas", {"t": 0.5}),
        ("karcher", 3, "models", {}),
    ],
)
def test_methods_that_need_them_report_them(method, count, of, parameters, tmp_path):
    base = tiny_state()
    models = [near(base, i) for i in range(1, count + 1)]
    made, _ = recipe(tmp_path, method, [base, *models], **parameters)
    report = fm.run(made, tmp_path / "out")
    zero = torch.zeros_like if of == "models" else lambda t: t
    floats = [k for k, t in base.items() if t.is_floating_point()]
    deltas = [torch.cat([(m[k] - zero(base[k])).double().reshape(-1) for k in floats]) for m in models]
    assert report.cosines["of"] == of
    assert set(report.cosines["tensors"]) == set(floats)
    for i, a in enumerate(deltas):
        assert report.cosines["lengths"][i] == pytest.approx(a.norm().item(), rel=1e-6)
        for j, b in enumerate(deltas):
            want = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
            assert report.cosines["matrix"][i][j] == pytest.approx(want, abs=1e-6)
    again = fm.run(made, tmp_path / "again", cosines=True, threads=1)
    assert again.cosines == report.cosines
    assert again.bytes_read == report.bytes_read


def test_one_read_more_and_the_same_weights(tmp_path):
    base = tiny_state()
    made, _ = recipe(tmp_path, "ties", [base, near(base, 1), near(base, 2)], weight=1.0, density=0.5)
    plain, asked = fm.run(made, tmp_path / "a"), fm.run(made, tmp_path / "b", cosines=True)
    assert plain.cosines is None
    copied = sum(t.nbytes for t in base.values() if not t.is_floating_point())
    assert asked.bytes_read - plain.bytes_read == 3 * sum(t.nbytes for t in base.values()) - 3 * copied
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_what_is_left_out_is_noted(tmp_path):
    base = {"w": torch.randn(4, 5), "v": torch.randn(6)}
    made, _ = recipe(tmp_path, "model_stock", [base, near(base, 1), near(base, 2)], filter_wise=True)
    report = fm.run(made, tmp_path / "out")
    assert set(report.cosines["tensors"]) == {"v"}
    assert any(note.startswith("cosines leave out 1 of 2 tensors, w among them") for note in report.notes)
    asked = fm.run(made, tmp_path / "asked", cosines=True)
    assert set(asked.cosines["tensors"]) == {"w", "v"}
    assert not any("cosines" in note for note in asked.notes)


def test_models_that_share_no_tensor_and_nan():
    cosines = Cosines(["x", "y", "z"])
    cosines.add("t", [0, 2], [[4.0, 2.0], [2.0, 4.0]], deltas=True, base_first=False)
    cosines.add("u", [1, 2], [[math.nan, math.nan], [math.nan, 9.0]], deltas=True, base_first=False)
    found = cosines.report(["u", "t", "missing"])
    assert list(found["tensors"]) == ["u", "t"]
    assert found["lengths"] == [2.0, None, math.sqrt(13)]
    assert found["matrix"][0] == [1.0, None, pytest.approx(2 / (2 * math.sqrt(13)))]
    assert found["matrix"][1] == [None, None, None]
    assert Cosines(["x"]).report(["t"]) is None


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny_state()
    made = tmp_path / "recipe.yml"
    for i in range(3):
        save(tmp_path / f"m{i}", near(base, i) if i else base)
    made.write_text(
        "merge_method: task_arithmetic\nbase_model: m0\nmodels: [{model: m1}, {model: m2}]\nparameters: {weight: 1}\n"
    )
    done = CliRunner().invoke(app, ["merge", str(made), str(tmp_path / "out"), "--cosines"])
    assert done.exit_code == 0, done.output
    assert "cosines between the deltas" in done.output
    assert "1.000" in done.output


def test_frank_wolfe_says_no(tmp_path):
    base = tiny_state()
    made, _ = recipe(tmp_path, "frank_wolfe", [base, near(base, 1), near(base, 2)], data="x.jsonl")
    with pytest.raises(BadInput, match="does not report cosines"):
        fm.run(made, tmp_path / "out", cosines=True)

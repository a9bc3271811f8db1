import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastmerge as fm
from fastmerge.cli import app
from fastmerge.errors import BadInput
from fastmerge.experts import Router, load_folder
from fastmerge.spectrum import spectrum


def family():
    g = torch.Generator().manual_seed(0)
    base = {"w.weight": torch.randn(31, 40, generator=g), "bias": torch.randn(5, generator=g)}
    models = [{k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in base.items()} for _ in range(2)]
    return base, models


def test_energy_and_removed_share_match_the_plain_transform():
    base, models = family()
    found = spectrum(base, models, bands=16, cutoff=0.5)
    delta = [(m["w.weight"] - base["w.weight"]).double() for m in models]
    for i, task in enumerate(["task1", "task2"]):
        kept = fm.ops.highpass_filter(delta[i], 0.5)
        share = 1 - float(kept.square().sum() / delta[i].square().sum())
        assert found.removed["w.weight"][task] == pytest.approx(share, rel=1e-4)
        f = torch.fft.fft2(delta[i]).abs() / math.sqrt(31 * 40)
        assert found.variance[task] == pytest.approx(float(f.square().mean() / f.mean() ** 2 - 1), rel=1e-4)
    assert list(found.removed) == ["w.weight"]
    assert all(-1 <= c <= 1 for c in found.interference["task1, task2"])


def test_identical_deltas_interfere_fully():
    base, models = family()
    found = spectrum(base, [models[0], models[0]], bands=8)
    assert found.interference["task1, task2"] == pytest.approx([1.0] * 8, abs=1e-6)


def test_nothing_selected_is_an_error():
    base, models = family()
    with pytest.raises(BadInput, match="no tensor is filtered"):
        spectrum(base, models, select="nothing")


@pytest.fixture
def folders(tmp_path):
    base, models = family()
    for name, state in zip(("base", "cars", "svhn"), (base, *models), strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_free_command_writes_backbone_and_experts(folders):
    report = json.loads(
        run("free", folders / "base", folders / "cars", folders / "svhn", "-o", folders / "out", "--json")
    )
    assert list(report["files"]) == ["experts/cars.safetensors", "experts/svhn.safetensors"]
    for file, size in report["files"].items():
        assert (folders / "out" / file).stat().st_size == size
    base, models = family()
    want = fm.merge("fr", base, models)
    got = load_file(folders / "out" / "model.safetensors")
    assert all(torch.equal(got[k], want[k]) for k in want)
    experts = load_folder(folders / "out" / "experts")
    assert list(experts) == ["cars", "svhn"]
    assert experts["cars"].entries == sum(
        len(x) for x in (t.index for t in fm.experts.extract(base, models)[0].tensors.values())
    )


def test_spectrum_command_draws(folders):
    arguments = ("spectrum", folders / "base", folders / "cars", folders / "svhn", "--json", "-o", folders / "s.png")
    found = json.loads(run(*arguments))
    assert set(found["amplitude"]) == {"cars", "svhn"}
    assert (folders / "s.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_route_commands(folders):
    (folders / "data").mkdir()
    for i, task in enumerate(("cars", "svhn")):
        save_file({"inputs": torch.randn(40, 6) + 3 * i}, folders / "data" / f"{task}.safetensors")
    run("route", "train", folders / "data", "-o", folders / "router", "--epochs", 10)
    assert Router.load(folders / "router").tasks == ["cars", "svhn"]
    result = json.loads(run("route", "test", folders / "router", folders / "data", "--json"))
    assert result["accuracy"] >= 0.95
    bad = CliRunner().invoke(app, ["route", "test", str(folders / "nowhere"), str(folders / "data")])
    assert bad.exit_code == 2

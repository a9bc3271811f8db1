"""merge_method free: fr's backbone as the engine writes it, and the experts beside it."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from checks import assert_same_bits
from safetensors.torch import load_file, save_file
from torch import nn

import fastmerge as fm
from fastmerge.errors import BadInput, Interrupted
from fastmerge.experts import FreeModel, extract, load_folder
from fastmerge.io.writer import Writer, work_folder
from fastmerge.recipe import Recipe

TASKS = ["cars", "svhn", "dtd"]


def family(dtype=torch.float32):
    g = torch.Generator().manual_seed(7)
    shapes = {"a.weight": (37, 300), "b.weight": (64, 64), "b.bias": (64,), "conv.weight": (8, 3, 5, 5)}
    base = {k: (torch.randn(s, generator=g) * 0.1).to(dtype) for k, s in shapes.items()}
    models = [
        {k: (v.float() + torch.randn(v.shape, generator=g) * 0.01 * (i + 1)).to(dtype) for k, v in base.items()}
        for i in range(3)
    ]
    return base, models


@pytest.fixture
def folders(tmp_path):
    base, models = family(torch.bfloat16)
    for name, state in zip(["base", *TASKS], [base, *models], strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    return tmp_path


def recipe(folder, **parameters):
    text = {"base_model": str(folder / "base"), "models": [{"model": str(folder / t)} for t in TASKS]}
    path = folder / "recipe.yml"
    path.write_text(json.dumps({**text, "merge_method": "free", "parameters": parameters}))
    return path


def same_expert(got, want):
    assert got.tensors.keys() == want.tensors.keys()
    for name, t in want.tensors.items():
        assert torch.equal(got.tensors[name].index, t.index), name
        assert got.tensors[name].mu == pytest.approx(t.mu, rel=1e-12), name
        if t.index.numel():
            assert_same_bits(got.tensors[name].value, t.value, name)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"density": 0.1, "by": "tensor", "mu": "balanced"}, {"mu": "vit", "cutoff": 0.3, "lambda": 0.5}],
    ids=["paper", "balanced", "vit"],
)
def test_a_recipe_writes_backbone_and_experts(folders, parameters):
    report = fm.run(recipe(folders, **parameters), folders / "out")
    base, models = family(torch.bfloat16)
    named = {("lambda_" if k == "lambda" else k): v for k, v in parameters.items()}
    backbone = {k: v for k, v in named.items() if k in ("cutoff", "lambda_")}
    got = load_file(folders / "out" / "model.safetensors")
    for k, v in fm.merge("fr", base, models, **backbone).items():
        assert_same_bits(got[k], v, k)
    experts = load_folder(folders / "out" / "experts")
    assert sorted(experts) == sorted(TASKS)
    for e in extract(base, models, tasks=TASKS, **named):
        same_expert(experts[e.task], e)
    assert report.files == {
        f"experts/{t}.safetensors": (folders / "out" / "experts" / f"{t}.safetensors").stat().st_size for t in TASKS
    }
    assert json.loads((folders / "out" / "fastmerge_report.json").read_text())["files"] == report.files


def test_tensor_by_tensor_parameters_and_per_model_density(folders):
    report = fm.run(
        recipe(folders, density=[{"filter": "a.weight", "value": 0.1}, {"value": 0.02}], tasks=["x", "y", "z"]),
        folders / "out",
    )
    assert list(report.files) == ["experts/x.safetensors", "experts/y.safetensors", "experts/z.safetensors"]
    x = load_folder(folders / "out" / "experts")["x"]
    assert x.tensors["a.weight"].index.numel() == 37 * 30
    assert x.tensors["b.weight"].index.numel() == 64  # int(0.02 · 64) = 1 a row
    base, models = family()
    for e, d in zip(extract(base, models, density=[0.01, 0.02, 0.1]), (0.01, 0.02, 0.1), strict=True):
        assert e.tensors["a.weight"].index.numel() == 37 * int(300 * d)
        assert e.density == d


def test_chunks_and_memory_give_the_same_experts(tmp_path):
    """Tensors longer than a chunk: by rows, by tensor, and the random trims."""
    g = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(700, 900, generator=g)}
    models = [{"w": base["w"] + 0.01 * torch.randn(700, 900, generator=g)} for _ in range(2)]
    for name, state in zip("bxy", [base, *models], strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    paths = [tmp_path / n for n in "xy"]
    for options in (
        {}, {"by": "tensor"}, {"trim": "window", "gamma": 0.02}, {"trim": "window", "gamma": 0.02, "by": "tensor"},
        {"trim": "random"}, {"trim": "rank_random"}, {"mu": "balanced"}, {"mu": "vit"},
    ):  # fmt: skip
        want = extract(base, models, tasks=["x", "y"], density=0.05, **options)
        for got, e in zip(extract(tmp_path / "b", paths, density=0.05, **options), want, strict=True):
            same_expert(got, e)


@pytest.mark.parametrize("by", ["row", "tensor"])
def test_window_leaves_out_the_largest(by):
    base, models = family()
    (e,) = extract(base, models[:1], density=0.1, trim="window", gamma=0.02, by=by)
    for name, t in e.tensors.items():
        delta = models[0][name] - base[name]
        rows = by == "row" and delta.ndim >= 2 and int(delta.shape[-1] * 0.1) >= 1
        x = delta.reshape(-1, delta.shape[-1]) if rows else delta.reshape(1, -1)
        n = x.shape[1]
        top, keep = int(0.02 * n), int(0.1 * n)
        order = x.abs().sort(dim=1, descending=True, stable=True).indices[:, top : top + keep]
        mask = torch.zeros_like(x, dtype=torch.bool).scatter_(1, order, True)
        assert torch.equal(t.index, mask.view(-1).nonzero().squeeze(1)), name


def test_random_trims_keep_about_the_density_and_depend_on_the_seed():
    base, models = family()
    for trim in ("random", "rank_random"):
        a, b = (extract(base, models[:1], density=0.2, trim=trim, epsilon=0.1, seed=s)[0] for s in (0, 1))
        assert 0.15 < a.tensors["a.weight"].index.numel() / (37 * 300) < 0.25
        assert not torch.equal(a.tensors["a.weight"].index, b.tensors["a.weight"].index)
    kept = a.tensors["a.weight"].value.abs().mean()
    assert kept > (models[0]["a.weight"] - base["a.weight"]).abs().mean()  # larger ranks are likelier


def test_balanced_mu_lies_between_the_norms():
    base, models = family()
    for e, m in zip(extract(base, models, density=0.05, mu="balanced", by="tensor"), models, strict=True):
        whole = torch.cat([(m[k] - base[k]).reshape(-1) for k in ("a.weight", "b.weight")]).double()
        kept = torch.cat([e.tensors[k].value for k in ("a.weight", "b.weight")]).double()
        ratios = [float(whole.norm(p) / kept.norm(p)) for p in (1, 2)]
        for t in e.tensors.values():
            assert t.mu == pytest.approx(math.sqrt(ratios[0] * ratios[1]), rel=1e-6)
        assert ratios[1] < t.mu < ratios[0]
    (all_kept,) = extract(base, models[:1], density=1.0, mu="balanced")
    assert all_kept.tensors["a.weight"].mu == pytest.approx(1.0)


def test_dry_run_says_what_it_would_write(folders):
    report = fm.run(recipe(folders, density=0.05), folders / "out", dry_run=True)
    assert not (folders / "out").exists()
    assert list(report.files) == [f"experts/{t}.safetensors" for t in TASKS]
    real = fm.run(recipe(folders, density=0.05), folders / "out").files
    for name, size in report.files.items():
        assert size == pytest.approx(real[name], rel=0.5)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"density": 0.0}, "density must be in"),
        ({"density": 2}, "density must be in"),
        ({"tasks": ["a", "b"]}, "3 models need as many different task names"),
        ({"tasks": ["a", "b", "c/d"]}, "can not be a file name"),
        ({"experts": "("}, "regular expression"),
        ({"trim": "rank_random", "epsilon": 0.5}, "must lie inside"),
        ({"trim": "window", "density": 0.6, "gamma": 0.6}, "more than everything"),
        ({"mu": "log"}, "mu must be one of"),
        ({"densty": 0.1}, "did you mean 'density'"),
    ],
)
def test_bad_parameters_are_found_before_anything_is_written(folders, parameters, match):
    for dry_run in (True, False):
        with pytest.raises(BadInput, match=match):
            fm.run(recipe(folders, **parameters), folders / "out", dry_run=dry_run)
    assert not (folders / "out").exists()
    assert not work_folder(folders / "out").exists()


def test_models_of_one_name_need_tasks(folders):
    twin = folders / "more" / "cars"
    twin.mkdir(parents=True)
    for file in (folders / "cars").iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadInput, match="different task names"):
        fm.merge("free", folders / "base", [folders / "cars", twin], out=folders / "out")


@pytest.mark.parametrize("when", ["tensors", "experts"])
def test_resuming_gives_the_same_bytes(folders, monkeypatch, when):
    path = recipe(folders, density=0.05, mu="balanced")
    fm.run(path, folders / "whole")
    finish, calls = Writer.finish, []

    def stop(self, name):
        finish(self, name)
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt

    def stop_saving(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "tensors":
            patch.setattr(Writer, "finish", stop)
        else:
            patch.setattr("fastmerge.experts.storage.save", stop_saving)
        with pytest.raises(Interrupted):
            fm.run(path, folders / "out")
    assert not (folders / "out").exists()
    fm.run(path, folders / "out", resume=True)
    names = ["model.safetensors", *(f"experts/{t}.safetensors" for t in TASKS)]
    for name in names:
        assert (folders / "out" / name).read_bytes() == (folders / "whole" / name).read_bytes(), name
    assert sorted(os.listdir(folders / "out" / "experts")) == sorted(f"{t}.safetensors" for t in TASKS)


def test_nan_policies(folders):
    state = load_file(folders / "cars" / "model.safetensors")
    state["a.weight"][3, 5] = math.nan
    save_file(state, folders / "cars" / "model.safetensors")
    with pytest.raises(BadInput, match=r"'a\.weight' has NaN or Inf"):
        fm.run(recipe(folders), folders / "out")
    report = fm.run(recipe(folders), folders / "out", nan="warn", force=True)
    assert list(report.nonfinite.values()) == [1]
    experts = load_folder(folders / "out" / "experts")
    assert all(math.isfinite(t.mu) for e in experts.values() for t in e.tensors.values())
    at = 3 * 300 + 5
    assert at in experts["cars"].tensors["a.weight"].index.tolist()  # NaN sorts above everything: it stays visible


def test_slices_and_state_dicts_are_refused_with_a_way_out(folders):
    base, models = family()
    with pytest.raises(BadInput, match=r"fm\.free"):
        fm.merge("free", base, models)
    with pytest.raises(BadInput, match="does not merge all 3 models"):
        fm.methods.get("free").plan_pass(
            [fm.methods.Header("w", (2, 2), torch.float32, defaults(3), (0, 1))], [f"m{i}" for i in range(3)]
        )


def defaults(count):
    return {n: [p.default] * count if p.per_model else p.default for n, p in fm.methods.get("free").parameters.items()}


def test_free_in_memory_and_into_a_folder(folders):
    base, models = family(torch.bfloat16)
    made = fm.free(base, models, tasks=TASKS, density=0.05, mu="balanced", lambda_=0.7)
    for k, v in fm.merge("fr", base, models, lambda_=0.7).items():
        assert_same_bits(made.backbone[k], v, k)
    report = fm.free(
        folders / "base", [folders / t for t in TASKS], out=folders / "out", density=0.05, mu="balanced", lambda_=0.7
    )
    assert list(report.files) == [f"experts/{t}.safetensors" for t in TASKS]
    for task, e in load_folder(folders / "out" / "experts").items():
        same_expert(e, made.experts[task])
    sizes = made.save(folders / "again")
    assert all((folders / "again" / f"{t}.safetensors").stat().st_size == n for t, n in sizes.items())
    with pytest.raises(BadInput, match="free has no parameter 'densty'"):
        fm.free(base, models, densty=0.1)
    with pytest.raises(BadInput, match="pass the module"):
        made.serve()


def test_experts_remember_how_they_are_combined():
    torch.manual_seed(0)
    base = nn.Linear(20, 30)
    models = [nn.Linear(20, 30) for _ in range(2)]
    made = fm.free(base, models, combine="override", density=0.2, mu="constant", constant=1.0)
    free = made.serve()
    assert free.combine == "override"
    free.use("task1")
    t = made.experts["task1"].tensors["weight"]
    want = models[0].weight.detach().view(-1)[t.index]
    torch.testing.assert_close(free.model.weight.detach().view(-1)[t.index], want)
    assert made.serve(combine="add").combine == "add"
    mixed = [fm.free(base, models, tasks=[c, "x"], combine=c).experts[c] for c in ("add", "override")]
    with pytest.raises(BadInput, match="pass combine="):
        FreeModel(nn.Linear(20, 30), mixed)


def readme_block():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    section = text.split("## FREE in ten lines")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch):
    code = readme_block()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)

    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 4))

    base = net()
    tuned = []
    for _ in range(2):
        m = net()
        m.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in base.state_dict().items()})
        tuned.append(m)
    images = [torch.rand(40, 1, 12, 12), torch.rand(40, 1, 12, 12) * 0.2]
    for name, m in zip(["base", "cars", "svhn"], [base, *tuned], strict=True):
        (tmp_path / "ckpt" / name).mkdir(parents=True)
        save_file(m.state_dict(), tmp_path / "ckpt" / name / "model.safetensors")
    monkeypatch.chdir(tmp_path / "ckpt")
    names = {
        "base": base, "cars": tuned[0], "svhn": tuned[1], "car_images": images[0], "svhn_images": images[1],
        "batch": torch.cat(images),
    }  # fmt: skip
    exec(compile(code, "README.md", "exec"), names)
    free = names["free"]
    assert names["logits"].shape == (80, 4)
    assert free.task in ("cars", "svhn")
    routed = free.route(names["batch"])
    assert routed[:40].eq(0).float().mean() > 0.9
    assert routed[40:].eq(1).float().mean() > 0.9
    assert sorted(p.name for p in (tmp_path / "ckpt" / "merged" / "experts").iterdir()) == [
        "cars.safetensors", "svhn.safetensors",
    ]  # fmt: skip


def test_recipes_round_trip(folders):
    loaded = Recipe.load(recipe(folders, density=0.02, tasks=["a", "b", "c"], mu="balanced"))
    again = folders / "again.yml"
    again.write_text(loaded.to_yaml())
    assert list(fm.run(again, folders / "out").files) == [f"experts/{t}.safetensors" for t in "abc"]

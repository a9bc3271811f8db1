"""The engine end to end on small checkpoints: values, layout independence, resuming, bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from checkpoints import load, near, save, tiny_state
from checks import assert_same_bits

import fastmerge as fm
from fastmerge.engine import run
from fastmerge.errors import BadInput, Interrupted
from fastmerge.io import pipeline
from fastmerge.io.writer import work_folder
from fastmerge.merging import merge
from fastmerge.recipe import Recipe
from fastmerge.spectrum import spectrum


@pytest.fixture
def family(tmp_path):
    base = tiny_state(0)
    states = [base, near(base, 1), near(base, 2), near(base, 3)]
    return [
        save(tmp_path / name, s, shards=n)
        for name, s, n in zip(["base", "a", "b", "c"], states, (1, 2, 1, 3), strict=True)
    ]


def recipe(tmp_path, method, folders, *, base=True, weight=0.5, **extra):
    data = {
        "merge_method": method,
        "models": [{"model": str(f), "parameters": {"weight": weight}} for f in folders[1:]],
        **({"base_model": str(folders[0])} if base else {}),
        **extra,
    }
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_task_arithmetic_of_folders_is_the_formula(tmp_path, family):
    report = run(recipe(tmp_path, "task_arithmetic", family, parameters={"lambda": 0.7}), tmp_path / "out")
    base, *models = (load(f) for f in family)
    got = load(tmp_path / "out")
    assert list(got) == sorted(base) or set(got) == set(base)
    for name, b in base.items():
        if not b.is_floating_point():
            assert_same_bits(got[name], b, name)
            continue
        total = (models[0][name] - b) * 0.5
        for m in models[1:]:
            total = total + (m[name] - b) * 0.5
        assert_same_bits(got[name], b + total * 0.7, name)
    assert report.bytes_written > 0
    assert {t.how for t in report.tensors} == {"merged", "copied"}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())["method"] == "task_arithmetic"


def test_the_result_does_not_depend_on_workers_chunks_or_shards(tmp_path, family, monkeypatch):
    path = recipe(tmp_path, "linear", family, base=False)
    run(path, tmp_path / "one", threads=1)
    monkeypatch.setattr(pipeline, "BLOCK", 16)
    monkeypatch.setattr(pipeline, "CHUNK", 16)
    run(path, tmp_path / "many", threads=3, max_shard_bytes=500)
    want, got = load(tmp_path / "one"), load(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    for name in want:
        assert_same_bits(got[name], want[name], name)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_bases_shards_are_kept(tmp_path, shards):
    base = tiny_state(0, dtype=torch.bfloat16)
    folders = [save(tmp_path / "base", base, shards=shards), save(tmp_path / "a", near(base, 1))]
    run(recipe(tmp_path, "task_arithmetic", folders), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    assert all(v.dtype == base[k].dtype for k, v in load(tmp_path / "out").items())


def test_mixed_dtypes_and_out_dtype(tmp_path):
    base = tiny_state(0)
    folders = [
        save(tmp_path / "base", base),
        save(tmp_path / "a", {k: v.bfloat16() if v.is_floating_point() else v for k, v in near(base, 1).items()}),
        save(tmp_path / "b", {k: v.half() if v.is_floating_point() else v for k, v in near(base, 2).items()}),
    ]
    run(recipe(tmp_path, "task_arithmetic", folders, out_dtype="bfloat16"), tmp_path / "out")
    b, x, y = (load(f) for f in folders)
    got = load(tmp_path / "out")
    name = "model.embed_tokens.weight"
    want = b[name] + ((x[name].float() - b[name]) * 0.5 + (y[name].float() - b[name]) * 0.5)
    assert_same_bits(got[name], want.bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_dry_run_writes_nothing(tmp_path, family):
    report = run(recipe(tmp_path, "linear", family, base=False), tmp_path / "out", dry_run=True)
    assert report.planned
    assert report.estimate["bytes_out"] > 0
    assert not (tmp_path / "out").exists()
    assert not work_folder(tmp_path / "out").exists()


# ---- bad input


def refused(tmp_path, path, match, **options):
    with pytest.raises(BadInput, match=match) as caught:
        run(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    return caught.value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("model.norm.weight"), r"1 tensors of .*base are missing: model\.norm\.weight"),
        (lambda s: s.update(extra=torch.ones(2)), r"1 tensors are not in .*base: extra"),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(9)}),
            r"'model\.norm\.weight' has shape \[9\], .* has \[8\]",
        ),
        (
            lambda s: s.update({"model.norm.weight": torch.ones(8, dtype=torch.int32)}),
            r"'model\.norm\.weight' has dtype torch\.int32",
        ),
        (
            lambda s: s.update({"model.position_ids": torch.zeros(5, dtype=torch.int64)}),
            r"'model\.position_ids' \(torch\.int64\) differs",
        ),
    ],
)
def test_mismatched_models_are_named_before_anything_is_written(tmp_path, change, match):
    base = tiny_state(0)
    other = near(base, 1)
    change(other)
    folders = [save(tmp_path / "base", base), save(tmp_path / "other", other)]
    error = refused(tmp_path, recipe(tmp_path, "task_arithmetic", folders), match)
    assert "other" in str(error)
    assert not work_folder(tmp_path / "out").exists()


def test_all_problems_are_reported_at_once(tmp_path):
    base = tiny_state(0)
    other = near(base, 1)
    other["model.norm.weight"] = torch.ones(9)
    other["model.layers.0.input_layernorm.weight"] = torch.ones(3)
    folders = [save(tmp_path / "base", base), save(tmp_path / "other", other)]
    error = refused(tmp_path, recipe(tmp_path, "task_arithmetic", folders), "2 problems")
    assert "model.norm.weight" in str(error)
    assert "layers.0.input_layernorm" in str(error)


def test_extra_tensors_can_be_left_out(tmp_path):
    base = tiny_state(0)
    folders = [
        save(tmp_path / "base", base),
        save(tmp_path / "o", near(base, 1) | {"lm_head.weight": torch.ones(37, 8)}),
    ]
    run(recipe(tmp_path, "task_arithmetic", folders), tmp_path / "out", ignore_extra=True)
    assert set(load(tmp_path / "out")) == set(base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_found_on_the_way_and_can_be_resumed_with_warn(tmp_path, value):
    base = tiny_state(0)
    bad = near(base, 1)
    bad["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    folders = [save(tmp_path / "base", base), save(tmp_path / "bad", bad)]
    path = recipe(tmp_path, "task_arithmetic", folders)
    error = refused(
        tmp_path, path, r"'model\.layers\.1\.mlp\.up_proj\.weight' has NaN or Inf \(first at flat index 19\)"
    )
    assert "bad" in str(error)
    assert work_folder(tmp_path / "out").exists()
    report = run(path, tmp_path / "out", resume=True, nan="warn")
    assert list(report.nonfinite.values()) == [1]
    assert "resumed" in {t.how for t in report.tensors}
    run(path, tmp_path / "whole", nan="allow")
    want, got = load(tmp_path / "whole"), load(tmp_path / "out")
    for name in want:
        assert_same_bits(got[name], want[name], name)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("method", "parameters", "says"),
    [
        ("ties", {"scope": "model", "density": [{"filter": "norm", "value": 0.5}, {"value": 0.2}]}, "scope: model"),
        ("fr", {"lambda": 1.0, "select": "(attn"}, "not a regular expression"),
        ("della", {"density": 0.1, "epsilon": 0.2}, "strictly inside"),
        ("multislerp", {"weight": 0.0}, "sum to 0"),
        ("mudsc", {"architecture": "nothing"}, "unknown architecture"),
    ],
)
def test_what_parameters_mean_for_the_tensors_is_checked_in_dry_runs(tmp_path, family, method, parameters, says):
    weight = parameters.pop("weight", 0.5)
    base = method != "mudsc"
    if method == "fr":
        data = {"merge_method": "fr", "base_model": str(family[0]), "parameters": parameters}
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump({**data, "models": [{"model": str(f)} for f in family[1:]]}))
    else:
        path = recipe(tmp_path, method, family, base=base, weight=weight, parameters=parameters)
    with pytest.raises(BadInput, match=says):
        run(path, tmp_path / "out", dry_run=True)


def test_small_max_memory_is_refused(tmp_path, family):
    refused(tmp_path, recipe(tmp_path, "linear", family, base=False), "max-memory 1000 is too small", max_memory=1000)


def test_a_method_that_holds_whole_tensors_says_what_it_needs(tmp_path, family):
    path = tmp_path / "fr.yml"
    models = [{"model": str(f)} for f in family[1:]]
    path.write_text(yaml.safe_dump({"merge_method": "fr", "base_model": str(family[0]), "models": models}))
    planned = run(path, tmp_path / "out", dry_run=True, threads=1)
    need = planned.estimate["buffer_bytes"]
    largest = max(math.prod(t.shape) for t in planned.tensors if len(t.shape) == 2)
    assert need > 12 * largest
    refused(tmp_path, path, f"fr needs {need} bytes", max_memory=need - 1, threads=1)
    run(path, tmp_path / "out", max_memory=need, threads=1)


def test_interrupt_leaves_a_resumable_job_and_the_same_bytes(tmp_path, family, monkeypatch):
    path = recipe(tmp_path, "task_arithmetic", family)
    run(path, tmp_path / "whole")
    from fastmerge.io.writer import Writer

    finish = Writer.finish
    count = 0

    def interrupted(self, name):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        finish(self, name)

    monkeypatch.setattr(Writer, "finish", interrupted)
    with pytest.raises(Interrupted, match="nothing was published") as caught:
        run(path, tmp_path / "out")
    assert "--resume" in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    report = run(path, tmp_path / "out", resume=True)
    assert [t.how for t in report.tensors].count("resumed") == 3
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_killed_process_can_be_resumed(tmp_path):
    base = {f"t{i}": torch.randn(400, 500) for i in range(20)}
    folders = [save(tmp_path / "base", base), save(tmp_path / "a", near(base, 1))]
    path = recipe(tmp_path, "task_arithmetic", folders)
    code = (
        "import sys, time; from fastmerge.io.writer import Writer; from fastmerge.engine import run\n"
        "f = Writer.finish\n"
        "def slow(self, name): f(self, name); time.sleep(0.1)\n"
        "Writer.finish = slow\n"
        "run(sys.argv[1], sys.argv[2])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(tmp_path / "out")])
    journal = work_folder(tmp_path / "out") / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    report = run(path, tmp_path / "out", resume=True)
    assert [t.how for t in report.tensors].count("resumed") >= 4
    run(path, tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_resume_refuses_models_in_another_order(tmp_path, family, monkeypatch):
    from fastmerge.io.writer import Writer

    def interrupted(self, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "finish", interrupted)
    with pytest.raises(Interrupted):
        run(recipe(tmp_path, "task_arithmetic", family), tmp_path / "out")
    monkeypatch.undo()
    swapped = [family[0], family[2], family[1], family[3]]
    with pytest.raises(BadInput, match="was a different one"):
        run(recipe(tmp_path, "task_arithmetic", swapped), tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_the_output_can_not_be_an_input(tmp_path, family):
    with pytest.raises(BadInput, match="one of the inputs"):
        run(recipe(tmp_path, "linear", family, base=False), family[1], force=True)
    assert load(family[1])


def test_a_wrong_recipe_found_by_the_fit_pass_leaves_nothing(tmp_path, family):
    path = recipe(
        tmp_path,
        "ties",
        family,
        parameters={"scope": "model", "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}]},
    )
    refused(tmp_path, path, "same for every tensor")
    assert not work_folder(tmp_path / "out").exists()


def test_hub_ids_are_fetched_and_failures_named(tmp_path, family, monkeypatch):
    import types

    asked = {}

    def snapshot_download(repo, revision=None, allow_patterns=None):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        if repo not in ("org/name", "gpt2"):
            raise OSError("404")
        return str(family[1])

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    state = merge("passthrough", None, ["org/name"])
    assert asked["repo"] == "org/name"
    assert "*.safetensors" in asked["patterns"]
    assert_same_bits(state["model.norm.weight"], load(family[1])["model.norm.weight"])
    merge("passthrough", None, ["gpt2@main"])  # the hub's first models have no owner
    assert (asked["repo"], asked["revision"]) == ("gpt2", "main")
    for gone in ("org/gone", "gone"):
        with pytest.raises(BadInput, match=f"'{gone}' is not a local folder and could not be fetched"):
            merge("passthrough", None, [gone])
    for file in ("model.safetensors", "./gone", "a/b/c", "-x"):
        with pytest.raises(BadInput, match="no folder or file"):
            merge("passthrough", None, [file])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match="hub ids need huggingface_hub"):
        merge("passthrough", None, ["org/name"])


# ---- from Python


def test_modules_take_the_asked_dtype():
    merged = merge("linear", None, [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)], weight=1.0, dtype=torch.bfloat16)
    assert merged.weight.dtype == torch.bfloat16


def test_a_tie_that_a_model_broke_is_named():
    base = tiny_state(0)
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    untied = near(base, 1)
    with pytest.raises(BadInput, match=r"'lm_head\.weight' is tied to"):
        merge("task_arithmetic", base, [untied], weight=1.0)


def test_state_dicts_modules_and_paths_agree(tmp_path, family):
    base, *models = (load(f) for f in family)
    state = merge("task_arithmetic", base, models, weight=[0.1, 0.2, 0.3], lambda_=0.5)
    assert isinstance(state, dict)
    again = merge("task_arithmetic", family[0], family[1:], weight=[0.1, 0.2, 0.3], lambda_=0.5)
    merge("task_arithmetic", family[0], family[1:], weight=[0.1, 0.2, 0.3], lambda_=0.5, out=tmp_path / "out")
    on_disk = load(tmp_path / "out")
    for name in base:
        assert_same_bits(again[name], state[name], name)
        assert_same_bits(on_disk[name], state[name], name)


def test_modules_come_back_as_modules_and_inputs_are_untouched():
    nets = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)) for _ in range(3)]
    before = [{k: v.clone() for k, v in n.state_dict().items()} for n in nets]
    merged = merge("linear", None, nets, weight=1.0)
    assert isinstance(merged, torch.nn.Sequential)
    assert merged is not nets[0]
    weights = [b["0.weight"] for b in before]
    assert_same_bits(merged[0].weight.detach(), (weights[0] + weights[1] + weights[2]) / 3.0)
    for n, b in zip(nets, before, strict=True):
        for k, v in n.state_dict().items():
            assert_same_bits(v, b[k], k)


def test_tied_weights_stay_tied():
    def tied(seed):
        state = tiny_state(seed)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    merged = merge("linear", None, [tied(1), tied(2)], weight=0.5)
    assert merged["lm_head.weight"].data_ptr() == merged["model.embed_tokens.weight"].data_ptr()


def test_bad_calls_are_named():
    state = tiny_state()
    with pytest.raises(BadInput, match="did you mean 'task_arithmetic'"):
        merge("task_arithmetik", state, [state], weight=1.0)
    with pytest.raises(BadInput, match=r"no parameter 'wieght'.*did you mean 'weight'"):
        merge("linear", None, [state], wieght=1.0)
    with pytest.raises(BadInput, match="2 values for 1 models"):
        merge("linear", None, [state], weight=[1.0, 2.0])
    for one, kind in (("base", "str"), (state, "dict"), (torch.nn.Linear(2, 2), "Linear"), (3, "int")):
        with pytest.raises(BadInput, match=f"models is a {kind}, not a list"):
            merge("linear", None, one, weight=1.0)
        for takes_models in (fm.free, fm.experts.extract, spectrum):
            with pytest.raises(BadInput, match=f"models is a {kind}, not a list"):
                takes_models(state, one)
    merge("linear", None, {"a": state}.values(), weight=1.0)
    merge("linear", None, torch.nn.ModuleList([torch.nn.Linear(2, 2)]), weight=1.0)
    with pytest.raises(BadInput, match=r'go on with nan="warn"'):
        merge("linear", None, [{"x": torch.tensor(float("nan"))}], weight=1.0)
    with pytest.raises(BadInput, match="models is empty"):
        merge("linear", None, [], weight=1.0)
    with pytest.raises(BadInput, match="in memory"):
        merge("linear", None, [state], weight=1.0, out="somewhere")
    with pytest.raises(BadInput, match=r"models\[0\]"):
        merge("linear", None, [3], weight=1.0)


def test_recipe_objects_run(tmp_path, family):
    made = Recipe.from_call("linear", None, [str(f) for f in family], {"weight": 0.25})
    run(made, tmp_path / "out")
    assert set(load(tmp_path / "out")) == set(load(family[0]))

"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import load as load_folder
from command_line import call, refused, three_checkpoints, write

import fastmerge
from fastmerge import cli, ops
from fastmerge._dispatch import Op
from fastmerge._terminal import Progress
from fastmerge.errors import Interrupted

OPS = [name for name in ops.__all__ if isinstance(getattr(ops, name), Op)]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return three_checkpoints(tmp_path)


# ---- merging


def test_merge_writes_a_checkpoint_folder(models):
    said = call("merge", write(models), models / "out")
    assert said.exit_code == 0, said.stderr
    merged, base = load_folder(models / "out"), load_folder(models / "base")
    a, b = load_folder(models / "a"), load_folder(models / "b")
    for name, t in {
        "model.embed_tokens.weight": 0.0,
        "model.layers.1.self_attn.q_proj.weight": 0.5,
        "model.norm.weight": 0.0,
    }.items():
        expected = ops.weighted_sum(base[name], [a[name], b[name]], [0.5, t], backend="reference")
        assert torch.equal(merged[name], expected)
    assert "written" in said.stdout
    for file in ("README.md", "mergekit_config.yml", "config.json", "fastmerge_report.json"):
        assert (models / "out" / file).is_file()
    assert (models / "out" / "mergekit_config.yml").read_text() == (models / "recipe.yml").read_text()


def test_merge_as_json_prints_one_document(models):
    said = call("merge", write(models), models / "out", "--json")
    report = json.loads(said.stdout)
    assert report["bytes_written"] > 0
    assert report["planned"] is False
    assert report["parameters"]["weight"] == [0.5, "0 … 1"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(models):
    before = sorted(models.rglob("*"))
    recipe = write(models)
    said = call("merge", recipe, models / "out", "--dry-run")
    assert said.exit_code == 0, said.stderr
    assert sorted(models.rglob("*")) == sorted([*before, recipe])
    for part in ("task_arithmetic", "weight = 0.5", "weight = 0 … 1", "lambda", "memory", "disk", "time", "at least"):
        assert part in said.stdout
    planned = json.loads(call("merge", recipe, models / "out", "--dry-run", "--json").stdout)
    assert planned["planned"] is True
    assert planned["estimate"]["bytes_out"] > 0
    assert planned["estimate"]["seconds"] > 0


def test_check_needs_no_output_folder(models):
    said = call("check", write(models))
    assert said.exit_code == 0
    assert "11 merged, 1 copied" in said.stdout


def test_options_reach_the_engine(models, monkeypatch):
    seen = {}

    def run(recipe, out, **options):
        seen.update(options, out=out)
        raise Interrupted("stopped", where="work", remedy="resume")

    monkeypatch.setattr("fastmerge.engine.run", run)
    arguments = [
        "--resume",
        "--force",
        "--threads",
        3,
        "--max-memory",
        "1.5G",
        "--max-vram",
        "8G",
        "--shard-size",
        "2MiB",
        "--nan",
        "warn",
    ]
    said = call(
        "merge",
        write(models),
        models / "out",
        *arguments,
        "--allow-pickle",
        "--ignore-extra",
        "--cosines",
        "--device",
        "cpu",
    )
    assert said.exit_code == 3
    assert said.stderr == "error: stopped\n  where: work\n  what to do: resume\n"
    del seen["progress"]
    assert seen == {
        "out": models / "out", "resume": True, "force": True, "device": "cpu", "threads": 3, "max_memory": 1_500_000_000,
        "max_vram": 8_000_000_000, "max_shard_bytes": 2 << 20, "nan": "warn", "allow_pickle": True, "ignore_extra": True, "dry_run": False,
        "cosines": True,
    }  # fmt: skip


def test_quiet_says_nothing(models):
    said = call("merge", write(models), models / "out", "--quiet")
    assert (said.exit_code, said.stdout, said.stderr) == (0, "", "")


def test_slices_update_the_configuration(models):
    config = {"model_type": "llama", "num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "torch_dtype": "float32"}
    (models / "base" / "config.json").write_text(json.dumps(config))
    sources = [
        [{"model": str(models / "base"), "layer_range": r}, {"model": str(models / "a"), "layer_range": r}]
        for r in ([0, 3], [1, 3])
    ]
    recipe = write(
        models, models=None, slices=[{"sources": s} for s in sources], parameters={"weight": 1.0}, out_dtype="bfloat16"
    )
    said = call("merge", recipe, models / "out")
    assert said.exit_code == 0, said.stderr
    merged = load_folder(models / "out")
    written = json.loads((models / "out" / "config.json").read_text())
    assert written == {
        "model_type": "llama", "num_hidden_layers": 5, "layer_types": ["x", "y", "z", "y", "z"], "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert merged["model.layers.4.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(
        merged["model.layers.4.mlp.up_proj.weight"],
        load_folder(models / "a")["model.layers.2.mlp.up_proj.weight"].to(torch.bfloat16),
    )


# ---- looking things up


def test_methods_and_their_parameters():
    listed = call("methods")
    assert listed.exit_code == 0
    for name in fastmerge.methods.names():
        assert name in listed.stdout
    one = call("methods", "task_arithmetic")
    for part in ("arXiv:2212.04089", "weight", "required", "lambda", "normalize"):
        assert part in one.stdout
    found = json.loads(call("methods", "--json").stdout)
    assert [m["name"] for m in found] == fastmerge.methods.names()
    weight = json.loads(call("methods", "linear", "--json").stdout)["parameters"][0]
    assert weight["name"] == "weight"
    assert weight["per_model"] is True
    assert weight["required"] is True
    assert weight["default"] is None
    refused(call("methods", "lineer"), "did you mean 'linear'?")


def test_operators_and_their_backends():
    listed = call("ops")
    assert listed.exit_code == 0
    for name in OPS:
        assert name in listed.stdout
    one = call("ops", "topk_mask")
    assert "density" in one.stdout
    assert "reference" in one.stdout
    told = call("ops", "highpass_filter").stdout
    assert "triton: a tensor is on cpu: Triton kernels run on a GPU" in " ".join(told.split())
    assert "pruned" in told
    found = {o["name"]: o for o in json.loads(call("ops", "--json").stdout)}
    assert found["weighted_sum"]["numerics"] == "A"
    assert json.loads(call("ops", "topk_mask", "--json").stdout)["kind"] == "selection"
    refused(call("ops", "topk_musk"), "did you mean 'topk_mask'?")


def test_doctor_tells_what_there_is():
    said = call("doctor")
    assert said.exit_code == 0, said.output
    assert torch.__version__ in said.stdout
    found = json.loads(call("doctor", "--json").stdout)
    assert found["engine"]["devices"][0] == "cpu"
    assert (
        (len(found["engine"]["devices"]) > 1) == (found["engine"]["why_not_cuda"] is None) == torch.cuda.is_available()
    )
    assert "merge --device" in said.stdout
    assert found["fastmerge"] == fastmerge.__version__
    assert set(found["ops"]) == set(OPS)
    assert found["cpu"]["usable_cpus"] >= 1
    for name, row in found["ops"].items():
        assert row["cpu"] in row["backends"], name
        assert row["cpu"] not in row["cpu_why_not"], name
        if not found["gpu"]["devices"]:
            assert row["cuda"] is None
            assert row["cuda_why_not"]
    if found["native"]["loaded"]:
        assert found["native"]["threads"] >= 1
        assert found["ops"]["weighted_sum"]["cpu"] == "cpu"
    assert fastmerge.doctor()["torch"] == found["torch"]


def test_demo_passes_on_what_it_is_given(monkeypatch):
    seen = []
    monkeypatch.setattr("fastmerge.demo.command.main", lambda *args, **options: seen.append((args, options)))
    assert call("demo", "--models", "base", "a", "b", "--quick", "--method", "ties", "--out", "o").exit_code == 0
    ((models,), options) = seen[0]
    assert models == [Path("base"), Path("a"), Path("b")]
    assert options == {"quick": True, "out": Path("o"), "cache": None, "json": False, "methods": ["ties"]}
    assert call("demo").exit_code == 0
    assert seen[1][0] == (None,)
    refused(call("demo", "base", "a"), "--models")


# ---- fastmerge-yaml


def test_every_flag_of_mergekit_yaml_is_understood(models):
    flags = [
        "--cuda", "--device", "auto", "--low-cpu-memory", "--read-to-gpu", "--multi-gpu", "--gpu-rich", "--lazy-unpickle",
        "--out-shard-size", "5B", "--clone-tensors", "--no-copy-tokenizer", "--trust-remote-code", "--allow-crimes",
        "--random-seed", "7", "-j", "2", "--async-write", "--write-threads", "2", "--transformers-cache", str(models / "cache"),
        "--lora-merge-cache", "x", "--lora-merge-dtype", "float16", "--safe-serialization", "--no-write-model-card", "-v", "-v",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    said = subprocess.run(
        [sys.executable, "-c", "from fastmerge.cli import main_yaml; main_yaml()", write(models), models / "out", *flags],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    for flag in (
        "--cuda",
        "--multi-gpu",
        "--gpu-rich",
        "--lazy-unpickle",
        "--clone-tensors",
        "--no-copy-tokenizer",
    ):
        assert f"note: ignored {flag}" in said.stderr
    assert load_folder(models / "out").keys() == load_folder(models / "base").keys()


@pytest.mark.parametrize("flag", ["--no-safe-serialization", "--unsafe-truncate-embeddings"])
def test_flags_that_would_change_the_result_are_refused(models, flag):
    refused(call(write(models), models / "out", flag, app=cli.yaml_app), flag)
    assert not (models / "out").exists()


def test_the_seed_reaches_the_recipe(models, monkeypatch):
    seen = []

    def run(recipe, *_: object, **__: object) -> None:
        seen.append(recipe.seed)
        raise Interrupted("enough")

    monkeypatch.setattr("fastmerge.engine.run", run)
    assert call(write(models), models / "out", "--random-seed", 7, app=cli.yaml_app).exit_code == 3
    assert seen == [7]


# ---- progress


def test_progress_without_a_terminal_is_a_line_a_second(capsys, monkeypatch):
    clock = iter([0.0, 0.5, 2.0, 2.1, 4.0])
    monkeypatch.setattr("fastmerge._terminal.time.monotonic", lambda: next(clock))
    with Progress() as progress:
        for done in (0, 10**9, 2 * 10**9, 2 * 10**9, 4 * 10**9):
            progress(done, 10 * 10**9, "merge")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("merge 2.00/10.00 GB · 1.00 GB/s · ETA 0:08 · RSS ")
    assert lines[1].startswith("merge 4.00/10.00 GB · 1.00 GB/s · ETA 0:06 · RSS ")


def test_progress_of_small_merges_is_in_smaller_units(capsys, monkeypatch):
    for total, shown in ((4 * 10**6, "2.00/4.00 MB · 1.00 MB/s"), (4000, "2.00/4.00 kB · 1.00 kB/s")):
        clock = iter([0.0, 2.0])
        monkeypatch.setattr("fastmerge._terminal.time.monotonic", lambda clock=clock: next(clock))
        with Progress() as progress:
            progress(0, total, "merge")
            progress(total // 2, total, "merge")
        assert shown in capsys.readouterr().err


def test_progress_of_a_resumed_job_counts_from_where_it_starts(capsys, monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("fastmerge._terminal.time.monotonic", lambda: next(clock))
    with Progress() as progress:
        progress(8 * 10**9, 10 * 10**9, "merge")
        progress(9 * 10**9, 10 * 10**9, "merge")
    assert "0.50 GB/s · ETA 0:02" in capsys.readouterr().err


# ---- the program itself


def test_help_and_version():
    for command in ([], ["merge"], ["check"], ["methods"], ["ops"], ["doctor"], ["demo"], ["bench"]):
        said = call(*command, "--help")
        assert said.exit_code == 0
        assert "Usage:" in said.stdout
    assert call("--version").stdout.strip() == fastmerge.__version__
    assert call("merg").exit_code == 2


def test_exit_codes_of_the_real_program(models):
    program = [sys.executable, "-m", "fastmerge.cli"]
    bad = subprocess.run([*program, "check", "none.yml"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr == "error: there is no recipe 'none.yml'\n  what to do: check the path\n"
    good = subprocess.run([*program, "check", write(models)], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")


def test_a_command_that_imports_triton_ends_without_a_word():  # its bindings complain of objects that are frozen
    code = (
        "from fastmerge._terminal import collecting_rarely\nwith collecting_rarely():\n    import torch, triton, gc\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "    assert gc.isenabled()"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

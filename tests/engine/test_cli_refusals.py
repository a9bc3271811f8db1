"""What the command line refuses: the message, the exit code, and nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import load as load_folder
from command_line import call, refused, three_checkpoints, write
from safetensors.torch import load_file, save_file

from fastmerge import cli


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return three_checkpoints(tmp_path)


def test_a_typo_in_the_recipe(models):
    recipe = write(models, merge_method="task_arithmatic")
    refused(call("merge", recipe, models / "out"), "did you mean 'task_arithmetic'?", f"{recipe}:", "what to do:")
    refused(call("check", write(models, densty=1)), "unknown key 'densty'")
    assert not (models / "out").exists()


def test_no_such_recipe_and_no_such_model(models):
    refused(call("merge", models / "none.yml", models / "out"), "there is no recipe", "none.yml")
    refused(call("check", write(models, base_model=str(models / "nope"))), "nope")


def test_an_output_folder_that_is_not_empty(models):
    (models / "out").mkdir()
    (models / "out" / "mine.txt").write_text("keep me")
    refused(call("merge", write(models), models / "out"), "not empty", "--force")
    assert (models / "out" / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize("problem", ["missing", "extra", "shape"])
def test_structural_problems_are_found_before_anything_is_written(models, problem):
    state = load_file(models / "a" / "model.safetensors")
    if problem == "missing":
        del state["model.norm.weight"]
    elif problem == "extra":
        state["model.more.weight"] = torch.zeros(2)
    else:
        state["model.norm.weight"] = torch.zeros(9)
    save_file(state, models / "a" / "model.safetensors")
    recipe = write(models)
    name = "model.more.weight" if problem == "extra" else "model.norm.weight"
    refused(call("merge", recipe, models / "out"), name, str(models / "a"), "what to do:")
    refused(call("check", recipe), name)
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base", "recipe.yml"]
    if problem == "extra":
        assert call("merge", recipe, models / "out", "--ignore-extra").exit_code == 0


def test_nan_is_found_named_and_can_be_resumed_with_a_warning(models):
    state = load_file(models / "a" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(state, models / "a" / "model.safetensors")
    recipe = write(models)
    said = call("merge", recipe, models / "out")
    refused(said, "model.layers.1.mlp.up_proj.weight", str(models / "a"))
    assert not (models / "out").exists()
    said = call("merge", recipe, models / "out", "--resume", "--nan", "warn")
    assert said.exit_code == 0, said.stderr
    assert "warning: 1 NaN or Inf" in said.stdout
    assert load_folder(models / "out")["model.layers.1.mlp.up_proj.weight"].isnan().sum() == 1


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", ["{bad", "[1]", NESTED, b"\xff\xfe\x00"])
@pytest.mark.parametrize("model", ["base", "b"])
def test_a_bad_configuration_is_found_before_anything_is_written(models, model, text):
    file = models / model / "config.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    recipe, said = write(models), ("config.json is not", str(file), "what to do: fetch or save")
    refused(call("check", recipe), *said)
    refused(call("merge", recipe, models / "out", "--dry-run"), *said)
    refused(call("merge", recipe, models / "out"), *said)
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base", "recipe.yml"]


def test_every_bad_configuration_is_listed(models, monkeypatch):
    for model in ("a", "b"):
        (models / model / "config.json").write_text("{}")
    read = Path.read_bytes  # root may read everything

    def refuse(path: Path) -> bytes:
        if path == models / "b" / "config.json":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (models / "a" / "config.json").write_text("{")
    said = call("merge", write(models), models / "out")
    refused(said, "2 problems with the models", str(models / "a" / "config.json"), "not valid JSON")
    refused(said, "config.json can not be read: Permission denied", str(models / "b" / "config.json"), "what to do:")
    assert not (models / "out").exists()


def test_side_files_that_can_not_be_read_are_found_before_anything_is_written(models, monkeypatch):
    may = os.access  # root may read everything
    monkeypatch.setattr("fastmerge.engine.os.access", lambda p, mode: Path(p).name != "tokenizer.json" and may(p, mode))
    refused(call("merge", write(models), models / "out"), str(models / "base" / "tokenizer.json"), "permissions")
    assert sorted(p.name for p in models.iterdir()) == ["a", "b", "base", "recipe.yml"]


def test_headers_and_indexes_nested_too_deeply(models):
    (models / "b" / "model.safetensors.index.json").write_text(NESTED)
    refused(call("check", write(models)), "index is not valid JSON", str(models / "b"), "what to do:")
    (models / "a" / "model.safetensors").write_bytes(len(NESTED).to_bytes(8, "little") + NESTED.encode())
    refused(call("check", write(models)), "header is not valid JSON", str(models / "a"), "what to do:")


def test_a_shard_of_no_bytes(models):
    for size in ("0", "0GB"):
        refused(call("merge", write(models), models / "out", "--shard-size", size), "--shard-size 0", "what to do:")
    assert not (models / "out").exists()


def test_a_resume_of_nothing_and_a_dangling_link_are_noted(models):
    (models / "base" / "tokenizer_config.json").symlink_to(models / "gone.json")
    recipe = write(models)
    note = f"tokenizer_config.json of {models / 'base'} is a link to a file that does not exist"
    assert note in " ".join(json.loads(call("check", recipe, "--json").stdout)["notes"])
    said = call("merge", recipe, models / "out", "--resume", "--json")
    assert said.exit_code == 0, said.stderr
    notes = " ".join(json.loads(said.stdout)["notes"])
    assert note in notes
    assert "nothing to resume" in notes
    assert not (models / "out" / "tokenizer_config.json").exists()


def test_a_link_to_nothing_and_a_folder_in_place_of_a_file(models):
    (models / "link").symlink_to(models / "gone")
    refused(
        call("check", write(models, base_model=str(models / "link"))), f"points to '{models / 'gone'}'", "what to do:"
    )
    (models / "a" / "model.safetensors").unlink()
    (models / "a" / "model.safetensors").symlink_to(models / "gone")
    refused(call("check", write(models)), "it is a link to", str(models / "a" / "model.safetensors"), "what to do:")
    (models / "a" / "model.safetensors").unlink()
    (models / "a" / "model.safetensors").mkdir()
    refused(call("check", write(models)), "it is a folder", str(models / "a" / "model.safetensors"), "what to do:")


def test_pickles_need_permission(models):
    state = load_file(models / "a" / "model.safetensors")
    torch.save(state, models / "a" / "pytorch_model.bin")
    (models / "a" / "model.safetensors").unlink()
    recipe = write(models)
    refused(call("merge", recipe, models / "out"), "--allow-pickle")
    assert call("merge", recipe, models / "out", "--allow-pickle").exit_code == 0


def test_errors_as_json(models):
    said = call("merge", write(models, merge_method="nope"), models / "out", "--json")
    error = json.loads(said.stdout)
    assert (said.exit_code, error["exit_code"]) == (2, 2)
    assert error["error"]["where"].startswith(str(models / "recipe.yml"))
    assert error["error"]["what_to_do"].startswith("the methods are ")


def test_debug_shows_the_traceback(models):
    said = call("merge", models / "none.yml", models / "out", "--debug")
    assert said.exit_code == 2
    assert "Traceback (most recent call last)" in said.stderr


def test_a_bug_is_called_a_bug(models, monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("fastmerge.engine.run", run)
    said = call("merge", write(models), models / "out")
    assert said.exit_code == 1
    assert "RuntimeError: boom" in said.stderr
    assert "report it" in said.stderr
    assert "Traceback" not in said.stderr


def test_ctrl_c_before_anything_happened(models, monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmerge.engine.run", run)
    assert call("merge", write(models), models / "out").exit_code == 3


def test_an_output_below_a_file_or_where_nothing_may_be_written(models, monkeypatch):
    recipe = write(models)
    (models / "file").write_text("mine")
    for out in (models / "file" / "out", models / "file" / "more" / "out"):
        refused(call("merge", recipe, out, "--dry-run"), f"{models / 'file'} is a file, not a folder", "what to do:")
    monkeypatch.setattr("fastmerge.io.writer.os.access", lambda path, mode: mode != 3)  # root may write everywhere
    refused(call("merge", recipe, models / "out"), f"nothing may be written to {models}", "what to do:")
    assert not (models / "out").exists()


def test_files_that_may_not_be_written(models, monkeypatch):
    def run(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere/out")

    monkeypatch.setattr("fastmerge.engine.run", run)
    refused(call("merge", write(models), models / "out"), "Permission denied", "/somewhere/out", "what to do:")


@pytest.mark.parametrize("size", ["", "4X", "-1G", "G", "1e9"])
def test_sizes_that_are_none(models, size):
    said = call("merge", write(models), models / "out", f"--max-memory={size}")
    assert said.exit_code == 2
    assert "is not a size" in said.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("4G", 4 * 10**9), ("512MiB", 512 << 20), ("900m", 9 * 10**8), ("5B", 5 * 10**9), ("123", 123), ("1.5kB", 1500), (None, None)],
)  # fmt: skip
def test_sizes(text, size):
    assert cli.parse_size(text) == size

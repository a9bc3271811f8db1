"""Runs the command line on tiny checkpoints: base, a and b in one folder, and a recipe beside them."""

from __future__ import annotations

from pathlib import Path

import yaml
from checkpoints import near, save, tiny_state
from typer.testing import CliRunner

from fastmerge import cli

runner = CliRunner()


def three_checkpoints(folder: Path) -> Path:
    base = tiny_state(0)
    save(folder / "base", base)
    save(folder / "a", near(base, 1))
    save(folder / "b", near(base, 2), shards=2)
    return folder


def write(folder: Path, **changes: object) -> Path:
    recipe: dict[str, object] = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / "a"), "parameters": {"weight": 0.5}},
            {"model": str(folder / "b"), "parameters": {"weight": [0.0, 1.0]}},
        ],
    }
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in (recipe | changes).items() if v is not None}))
    return path


def call(*arguments: object, app=cli.app):
    return runner.invoke(app, [str(a) for a in arguments])


def refused(said, *parts: str) -> None:
    assert said.exit_code == 2, said.output
    assert said.stderr.startswith("error: ")
    assert "Traceback" not in said.output
    for part in parts:
        assert part in said.stderr

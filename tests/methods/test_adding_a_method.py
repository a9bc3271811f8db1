"""The example of docs/adding-a-method.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastmerge
from fastmerge import cli
from fastmerge.methods._method import registered

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture(scope="module", autouse=True)
def example():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})
    yield
    del registered()["strongest"]


def test_it_merges():
    base = {"w": torch.tensor([1.0, 1.0, 1.0])}
    models = [{"w": torch.tensor([2.0, 0.5, 1.0])}, {"w": torch.tensor([0.5, 4.0, 2.0])}]
    assert fastmerge.merge("strongest", base, models)["w"].tolist() == [2.0, 4.0, 2.0]
    merged = fastmerge.merge("strongest", base, models, weight=[4, 1], lambda_=0.5)
    assert merged["w"].tolist() == [3.0, 2.5, 1.5]


def test_its_ranges_are_checked():
    with pytest.raises(fastmerge.BadInput, match="lambda must be >= 0, not -1"):
        fastmerge.merge("strongest", {"w": torch.ones(1)}, [{"w": torch.ones(1)}], lambda_=-1)


def test_it_is_listed():
    said = CliRunner().invoke(cli.app, ["methods", "strongest"])
    for part in ("weighted deltas, element by element", "weight", ">= 0", "factor of the merged delta"):
        assert part in said.stdout

"""The same YAML gives mergekit's numbers. The fixture was made by make_mergekit_golden.py with mergekit 0.1.5."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from integrations.mergekit_cases import CASES, write_models
from safetensors import safe_open
from safetensors.numpy import load_file

import fastmerge

GOLDEN = Path(__file__).parent / "golden" / "mergekit.safetensors"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("mergekit"))


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, np.ndarray]]:
    with safe_open(GOLDEN, "np") as f:
        assert f.metadata()["mergekit"] == "0.1.5"
    cases: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in load_file(GOLDEN).items():
        case, _, name = key.partition("|")
        cases.setdefault(case, {})[name] = tensor
    return cases


def test_the_fixture_holds_every_case(golden):
    assert golden.keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_same_yaml_same_numbers(case, paths, golden, tmp_path):
    recipe = fastmerge.Recipe.parse(CASES[case].format(**paths) + "\ndtype: float32\n", source="golden.yml")
    fastmerge.run(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == golden[case].keys()
    for name, expected in golden[case].items():
        assert merged[name].dtype == np.float32
        # both sum a handful of float32 products of size 1, in different orders
        np.testing.assert_allclose(merged[name], expected, rtol=0, atol=2e-6, err_msg=name)

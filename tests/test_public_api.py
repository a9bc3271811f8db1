"""The public surface: what is promised exists, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastmerge

PUBLIC = [
    "BackendUnavailable",
    "BadInput",
    "FastmergeError",
    "FrankWolfeResult",
    "Interrupted",
    "Recipe",
    "Report",
    "align",
    "doctor",
    "experts",
    "frank_wolfe",
    "frank_wolfe_soft",
    "free",
    "gradient",
    "merge",
    "method",
    "methods",
    "mudsc",
    "ops",
    "run",
    "structure",
    "use_backend",
]


def test_the_surface_is_exactly_this():
    assert sorted(fastmerge.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(fastmerge))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_is_documented(name):
    assert getattr(fastmerge, name).__doc__


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse(Path(fastmerge.__file__).read_text())
    guarded = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {alias.name for n in guarded.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == set(fastmerge.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="merg_"):
        _ = fastmerge.merg_


def _modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(json.loads(said.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import fastmerge", "import fastmerge.cli", "import fastmerge.errors"])
def test_nothing_heavy_is_imported_before_it_is_needed(code):
    heavy = {"torch", "numpy", "scipy", "pydantic", "yaml", "huggingface_hub", "transformers", "triton", "matplotlib"}
    assert not heavy & _modules_after(code)


def test_the_engine_imports_only_what_every_merge_needs():
    heavy = {"scipy.optimize", "transformers", "huggingface_hub", "triton", "matplotlib", "fastmerge.structure"}
    assert not heavy & _modules_after("import fastmerge.engine, fastmerge.recipe, fastmerge.cli")

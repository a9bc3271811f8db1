"""Every operator has a reference, a kernel, cases, a test and a benchmark, each where a reader looks for it."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

import fastmerge.ops
from fastmerge._dispatch import Op

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
OPS = {name: value for name in fastmerge.ops.__all__ if isinstance(value := getattr(fastmerge.ops, name), Op)}
# fw_lmo is arithmetic on K·L numbers; its kernel is that of fw_products. pearson's is torch's GEMM.
KERNEL_ELSEWHERE = {"fw_lmo": "csrc/ops/fw_products.cpp", "pearson": "fastmerge/ops/pearson.py"}
KERNEL_ELSEWHERE |= dict.fromkeys(("sce_energy", "sce_variance"), "csrc/ops/sce_merge.cpp")
KERNEL_ELSEWHERE |= dict.fromkeys(("arcee_divergence", "arcee_importance"), "csrc/ops/arcee_merge.cpp")
KERNEL_ELSEWHERE |= {"line_gram": "csrc/ops/line_merge.cpp", "ram_counts": "csrc/ops/ram_merge.cpp"}


def test_every_operator_module_is_in_the_table_of_contents():
    modules = {p.stem for p in (ROOT / "fastmerge/ops").glob("*.py") if not p.stem.startswith("_")}
    defined = {m for m in modules if "@op(" in (ROOT / f"fastmerge/ops/{m}.py").read_text()}
    assert defined == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_operator_is_complete(name):
    the_op = OPS[name]
    assert (ROOT / f"fastmerge/ops/{name}.py").is_file()
    assert the_op.cases, f"{name} has no cases"
    assert the_op.backends, f"{name} has no backend besides its reference"
    kernels = [f"csrc/ops/{name}.cpp", f"csrc/ops/{name}.cu", f"triton_kernels/{name}.py", KERNEL_ELSEWHERE.get(name)]
    assert any(k and (ROOT / k).is_file() for k in kernels), f"{name} has no kernel"
    assert (ROOT / f"tests/ops/test_{name}.py").is_file(), f"{name} has no test"
    assert (ROOT / f"benchmarks/ops/{name}.py").is_file(), f"{name} has no benchmark"


@pytest.mark.parametrize("name", OPS)
def test_docstring_says_what_it_must(name):
    doc = OPS[name].reference.__doc__ or ""
    for part in ("Numerics:", "Cost:", "Raises:"):
        assert part in doc, f"{name}: the docstring has no {part}"
    assert f"class {OPS[name].numerics}" in doc, (
        f"{name}: the docstring names another numerics class than {OPS[name].numerics}"
    )


@functools.cache
def nodes(path):
    """Everything in a module's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


def refusals_without_a_remedy(code):
    calls = [n for n in code if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    made = [n for n in calls if n.func.id in ("BadInput", "Interrupted") and all(k.arg != "remedy" for k in n.keywords)]
    return [ast.unparse(n) for n in made]


def test_every_refusal_says_what_to_do():
    call = "BadInput('no', where='x')"
    assert refusals_without_a_remedy(ast.walk(ast.parse(f"raise {call}"))) == [call]  # it finds one
    found = {p: refusals_without_a_remedy(nodes(p)) for p in (ROOT / "fastmerge").rglob("*.py")}
    elided = "BadInput(f'... and {len(problems) - MOST_PROBLEMS} more')"  # the end of a list whose items say it
    assert {str(p): calls for p, calls in found.items() if calls and calls != [elided]} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/ops").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_benchmarks_are_of_operators(path):
    assert path.stem in OPS
    names = [
        ast.unparse(t)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        for t in node.targets
    ]
    assert "BENCH" in names


def test_every_package_goes_into_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for folder in {p.parent for p in (ROOT / "fastmerge").rglob("__init__.py")}:
        assert ".".join(folder.relative_to(ROOT).parts) in listed


def test_every_import_is_a_declared_dependency():
    """Of the package itself: what it imports anywhere must come with `pip install fastmerge` or one of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    declared = {re.split(r"[<>=;!~ \[]", d)[0].lower().replace("-", "_") for d in listed}
    modules = {"yaml": "pyyaml", "PIL": "pillow", "cuda": "cuda_bindings", "cupy": "cupy_cuda13x"}
    missing = set()
    for path in [*(ROOT / "fastmerge").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]:
        for node in nodes(path):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for top in {n.partition(".")[0] for n in names} - set(sys.stdlib_module_names) - {"fastmerge"}:
                if modules.get(top, top).lower() not in declared:
                    missing.add((path.name, top))
    assert not missing


def test_what_a_merge_needs_is_no_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plain = {re.split(r"[<>=;!~ \[]", d)[0] for d in project["dependencies"]}
    assert {"torch", "numpy", "pydantic", "pyyaml", "typer", "rich", "scipy", "xxhash", "safetensors"} <= plain


def test_contributing_shows_the_whole_package():
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    for stem, ends in re.findall(r"(\w+_){([\w,]+)}\.py", tree):
        tree += " ".join(f"{stem}{end}.py" for end in ends.split(","))
    entries = [p for p in (ROOT / "fastmerge").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
    assert [p.name for p in entries if p.name not in tree] == []
    named = {m for m in re.findall(r"^  ([a-z]\w*)/ ", tree, re.MULTILINE)} - {"common"}
    assert named <= {p.name for p in entries}

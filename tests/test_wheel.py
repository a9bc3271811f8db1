"""A wheel, built from the clone and installed away from it, holds what it should and merges."""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import load, near, save, tiny_state
from checks import assert_same_bits
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastmerge as fm

CLONE = Path(__file__).parents[1]
KIND = os.environ.get("FASTMERGE_BUILD", "auto")


def _run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder, kind):
    # In the build folder that the set-up used: what it compiled is not compiled again.
    environment = {**os.environ, "FASTMERGE_BUILD": kind}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    _run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        CLONE,
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        folder,
        env=environment,
    )
    (built,) = folder.glob("*.whl")
    return built


def closure(names):
    """What the requirements `names`, and theirs in turn, are satisfied by here: distributions by name, no extras."""
    found, todo = {}, list(names)
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = importlib.metadata.distribution(name)
            todo += found[name].requires or ()
    return found


def environment(folder, wheel):
    """The interpreter of an environment of its own: the wheel, the libraries it says it needs, and nothing else.

    The libraries are links to those of this environment; pip, without an index, checks that they satisfy the wheel.
    """
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = Path(_run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    with zipfile.ZipFile(wheel) as z:
        (metadata,) = (n for n in z.namelist() if n.endswith(".dist-info/METADATA"))
        needs = email.message_from_bytes(z.read(metadata)).get_all("Requires-Dist")
    for distribution in closure(needs).values():
        for top in {f.parts[0] for f in distribution.files if f.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    _run(*pip, "install", "-q", "--no-index", wheel)
    _run(*pip, "check")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), KIND)


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("environment"), wheel)


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.partition("/")[0] for n in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"fastmerge"}
    assert any(n.startswith("fastmerge/_C") and n.endswith(".so") for n in names)
    for wanted in ("fastmerge/py.typed", "fastmerge/triton_kernels/__init__.py", "fastmerge/benchmarks/__init__.py"):
        assert wanted in names
    # What NVRTC compiles through CuPy, and what the alignment of known architectures reads: every file of the clone.
    for pattern in ("csrc/common/*.h", "csrc/common/*.cuh", "csrc/ops/*.cuh", "fastmerge/structure/specs/*.toml"):
        files = [f.relative_to(CLONE).as_posix().removeprefix("fastmerge/") for f in CLONE.glob(pattern)]
        assert files, pattern
        assert {f"fastmerge/{f}" for f in files} <= set(names), pattern
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".o")) or "/tests/" in n or "/test_" in n]


def test_merges_away_from_the_clone(python, tmp_path):
    base = tiny_state()
    folders = [save(tmp_path / "base", base), save(tmp_path / "a", near(base, 1)), save(tmp_path / "b", near(base, 2))]
    code = (
        "import sys, fastmerge as fm, fastmerge.triton_kernels, fastmerge.benchmarks\n"
        "assert 'environment' in fm.__file__, fm.__file__\n"
        "base, a, b, out = sys.argv[1:]\n"
        "report = fm.merge('task_arithmetic', base, [a, b], weight=0.5, out=out)\n"
        "assert report.backends == {'weighted_sum': 'cpu'}, report.backends\n"
    )
    _run(python, "-c", code, *folders, tmp_path / "out", cwd=tmp_path)
    assert set(load(tmp_path / "out")) == set(base)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")
    _run(python.with_name("fastmerge"), "merge", "recipe.yml", "linear", cwd=tmp_path)
    assert set(load(tmp_path / "linear")) == set(base)


def test_a_wheel_with_cuda_kernels_needs_no_cuda_to_import(python, wheel, tmp_path):
    code = (
        "import json, torch, fastmerge as fm\n"
        "from fastmerge import _cuda, _native\n"
        "found = fm.doctor()\n"
        "mapped = open('/proc/self/maps').read()\n"
        "print(json.dumps([_native.lib().cuda_devices(), _native.lib().cuda_kernels(), found['native']['cuda'],"
        " found['toolchain']['cuda_kernels'], 'libcudart' in mapped]))\n"
    )
    (count, reason), kernels, built, would_run, loaded = json.loads(_run(python, "-c", code, cwd=tmp_path))
    if shutil.which("nvcc") is None or KIND == "cpu":
        assert (kernels, built, count) == ([], None, 0)
        return
    assert built
    assert "permute_rows_kernel_16" in kernels
    with zipfile.ZipFile(wheel) as z:
        (module,) = (n for n in z.namelist() if n.startswith("fastmerge/_C"))
        linked = _run("readelf", "-d", z.extract(module, tmp_path))
    assert not re.search(r"NEEDED.*(libcuda|libcudart|libtorch)", linked)
    if not torch.cuda.is_available():
        assert count == 0
        assert not loaded
        assert reason
        assert would_run.startswith(f"none: nvcc build: no CUDA device: {reason}; NVRTC through CuPy: ")


def test_without_a_compiler_the_reference_serves_and_doctor_says_so(tmp_path):
    python = environment(tmp_path / "environment", build(tmp_path / "wheel", "off"))
    base = tiny_state()
    folders = [save(tmp_path / "base", base), save(tmp_path / "a", near(base, 1)), save(tmp_path / "b", near(base, 2))]
    code = (
        "import sys, fastmerge as fm\n"
        "base, a, b, out = sys.argv[1:]\n"
        "report = fm.merge('ties', base, [a, b], weight=0.5, density=0.3, out=out)\n"
        "assert report.backends == {'consensus_merge': 'reference'}, report.backends\n"
        "print(fm.doctor())\n"
    )
    said = _run(python, "-c", code, *folders, tmp_path / "out", cwd=tmp_path)
    assert "FASTMERGE_BUILD=off" in said
    native = fm.merge("ties", folders[0], folders[1:], weight=0.5, density=0.3)
    for name, got in load(tmp_path / "out").items():
        assert_same_bits(got, native[name], name)

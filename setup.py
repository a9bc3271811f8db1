"""A bridge from setuptools to CMake; everything else is in pyproject.toml.

FASTMERGE_BUILD = auto (default: CPU kernels, and CUDA ones when nvcc is found) | cpu | cuda | off (pure PyTorch).
"""

import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

BUILD = os.environ.get("FASTMERGE_BUILD", "auto")
if BUILD not in ("auto", "cpu", "cuda", "off"):
    sys.exit(f"FASTMERGE_BUILD={BUILD!r} is not one of auto, cpu, cuda, off")


def kept_pybind11(work: Path) -> str:
    """pybind11's CMake folder, from a copy in the build folder.

    pip builds in an environment that it makes anew each time: with headers from there, nothing compiled before could
    ever be used again.
    """
    import pybind11

    kept = work / f"pybind11-{pybind11.__version__}"
    if not kept.exists():
        with tempfile.TemporaryDirectory(dir=work) as half:
            copy = Path(half) / kept.name
            shutil.copytree(Path(pybind11.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
            copy.rename(kept)
    return str(kept / Path(pybind11.get_cmake_dir()).relative_to(Path(pybind11.__file__).parent))


def tool(name: str) -> list[str]:
    """A compiler: where it is, and which one is there."""
    path = shutil.which(name)
    if path is None:
        return [name]
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return [path, os.path.realpath(path), said.stdout]


def program(name: str) -> str | None:
    """CMake or Ninja of this environment, or else of PATH, where another version may be first.

    Files made by one version of CMake are all made again by another.
    """
    try:
        package = importlib.import_module(name)
        folder = package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR
    except (ImportError, AttributeError):
        folder = None
    return (folder and shutil.which(name, path=folder)) or shutil.which(name)


class Modules(build_py):
    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Without benchmarks/test_operators.py, which pytest runs in a clone."""
        return [m for m in super().find_package_modules(package, package_dir) if not m[1].startswith("test_")]

    def run(self) -> None:
        if not self.editable_mode:  # what was removed since the last build must not be in a wheel
            shutil.rmtree(Path(self.build_lib) / "fastmerge", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        here = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(
            os.environ.get("FASTMERGE_BUILD_DIR", here / "build" / f"cmake-{BUILD}-{sys.implementation.cache_tag}")
        )
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:  # one build at a time; the rest wait, and find everything made
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.build_in(here, work, target)

    def build_in(self, here: Path, work: Path, target: Path) -> None:
        configure = [
            program("cmake") or "cmake", "-S", str(here), "-B", str(work), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={kept_pybind11(work)}",
            f"-DFASTMERGE_BUILD={BUILD}",
            f"-DFASTMERGE_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        # CMake remembers what it found: other tools or flags than last time need a fresh look, and compile everything.
        variables = ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAARCHS", "CUDAHOSTCXX")
        tools = [tool(os.environ.get("CXX") or "c++"), tool(os.environ.get("CUDACXX") or "nvcc")]
        found = json.dumps([configure[1:], {v: os.environ.get(v) for v in variables}, tools])
        seen = work / "configured.json"
        same = seen.exists() and seen.read_text() == found
        seen.unlink(missing_ok=True)
        if ninja := program("ninja"):  # not the one that CMake remembers
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        try:
            subprocess.run(configure + ["--fresh"] * (not same), check=True)
            seen.write_text(found)
            subprocess.run([configure[0], "--build", str(work), "--target", "_C"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"fastmerge: the native kernels could not be built ({error}).\n"
                "They need a C++17 compiler (gcc >= 11); to install the pure-PyTorch reference without one, "
                "set FASTMERGE_BUILD=off."
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        built = next(work.glob("_C*.so"))
        shutil.copy2(built, target)  # even over a newer one, which may be of another FASTMERGE_BUILD


setup(
    ext_modules=[] if BUILD == "off" else [Extension("fastmerge._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": Modules},
)

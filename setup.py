"""A bridge from setuptools to CMake; everything else is in pyproject.toml.

FASTMERGE_BUILD = auto (default: CPU kernels, and CUDA ones when nvcc is found) | cpu | cuda | off (pure PyTorch).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
        half = work / f"pybind11-{os.getpid()}"
        shutil.copytree(Path(pybind11.__file__).parent, half, ignore=shutil.ignore_patterns("__pycache__"))
        half.rename(kept)
    return str(kept / Path(pybind11.get_cmake_dir()).relative_to(Path(pybind11.__file__).parent))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        here = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(
            os.environ.get("FASTMERGE_BUILD_DIR", here / "build" / f"cmake-{BUILD}-{sys.implementation.cache_tag}")
        )
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(here), "-B", str(work), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={kept_pybind11(work)}",
            f"-DFASTMERGE_BUILD={BUILD}",
            f"-DFASTMERGE_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        # CMake remembers what it found: other tools or flags than last time need a fresh look, and compile everything.
        variables = ("CXX", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAARCHS", "CUDAHOSTCXX")
        tools = [shutil.which("c++"), shutil.which("nvcc")]
        found = json.dumps([configure, {v: os.environ.get(v) for v in variables}, tools])
        seen = work / "configured.json"
        same = seen.exists() and seen.read_text() == found
        seen.unlink(missing_ok=True)
        if ninja := shutil.which("ninja"):  # of this environment, not the one that CMake remembers
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        try:
            subprocess.run(configure + ["--fresh"] * (not same), check=True)
            seen.write_text(found)
            subprocess.run(["cmake", "--build", str(work), "--target", "_C"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"fastmerge: the native kernels could not be built ({error}).\n"
                "They need a C++17 compiler (gcc >= 11); to install the pure-PyTorch reference without one, "
                "set FASTMERGE_BUILD=off."
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        built = next(work.glob("_C*.so"))
        self.copy_file(str(built), str(target))


setup(
    ext_modules=[] if BUILD == "off" else [Extension("fastmerge._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

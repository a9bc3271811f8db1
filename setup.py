"""A bridge from setuptools to CMake; everything else is in pyproject.toml.

FASTMERGE_BUILD = auto (default: CPU kernels, and CUDA ones when nvcc is found) | cpu | cuda | off (pure PyTorch).
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = os.environ.get("FASTMERGE_BUILD", "auto")
if BUILD not in ("auto", "cpu", "cuda", "off"):
    sys.exit(f"FASTMERGE_BUILD={BUILD!r} is not one of auto, cpu, cuda, off")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        here = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(
            os.environ.get("FASTMERGE_BUILD_DIR", here / "build" / f"cmake-{BUILD}-{sys.implementation.cache_tag}")
        )
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(here), "-B", str(work), "-G", "Ninja", "--fresh",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTMERGE_BUILD={BUILD}",
            f"-DFASTMERGE_VERSION={self.distribution.get_version()}",
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
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

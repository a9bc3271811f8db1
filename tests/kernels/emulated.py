"""The CUDA kernels on the CPU: the emulator (emulator/*.h, *.cpp) built with g++, and an executor that runs on it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmerge import _cuda, _cupy

HERE = Path(__file__).parent / "emulator"
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


@functools.cache
def build(sanitizer: str = "") -> Path:
    """The shared library of all kernels (and the planted bugs), kept while its sources and flags do not change."""
    csrc = _cupy.source_folder()
    flags = [
        "-std=c++20",
        "-O1" if sanitizer else "-O2",
        "-g",
        "-ffp-contract=off",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        *SANITIZERS[sanitizer],
    ]
    sources = [*sorted(HERE.iterdir()), *sorted((csrc / "ops").glob("*.cuh")), *sorted((csrc / "common").glob("*.cuh"))]
    digest = hashlib.sha256(repr(flags).encode() + b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fastmerge-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "g++")
        subprocess.run(
            [compiler, *flags, f"-I{csrc}", f"-I{HERE}", str(HERE / "module.cpp"), "-o", str(part)], check=True
        )
        part.rename(library)  # two processes may build at once
    return library


class Traffic(NamedTuple):
    """Global memory of the launches: bytes asked for, and bytes in the whole sectors that hold them."""

    loaded: int
    stored: int
    used_loaded: int
    used_stored: int


class Emulator:
    """An executor for :func:`fastmerge._cuda.use_executor` whose device is the CPU."""

    device_type = "cpu"

    def __init__(self, *, schedule: int = 0, sanitizer: str = "") -> None:
        self.schedule = schedule
        self.library = ctypes.CDLL(str(build(sanitizer)))
        self.launches: list[tuple[str, int, int]] = []  # (kernel, blocks, shared)
        pointer, number = ctypes.c_void_p, ctypes.c_uint
        self.library.fm_launch.argtypes = [
            ctypes.c_char_p, number, number, ctypes.c_size_t, pointer, pointer, number, ctypes.c_int,
        ]  # fmt: skip
        self.library.fm_counted.argtypes = [ctypes.POINTER(ctypes.c_uint64)]

    def why_not(self, device: torch.device) -> str | None:
        return None

    def launch(self, kernel: str, blocks: int, shared: int, tasks: Tensor, first_block: Tensor, count: int) -> None:
        self.launches.append((kernel, blocks, shared))
        missing = self.library.fm_launch(
            kernel.encode(),
            blocks,
            _cuda.THREADS,
            shared,
            tasks.data_ptr(),
            first_block.data_ptr(),
            count,
            self.schedule,
        )
        assert not missing, f"no kernel is called {kernel}"

    def count(self, on: bool) -> None:
        self.library.fm_count(int(on))

    def traffic(self) -> Traffic:
        values = (ctypes.c_uint64 * 4)()
        self.library.fm_counted(values)
        return Traffic(*values)

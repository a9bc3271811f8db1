"""The only importer of CuPy: compiles csrc/ops/*.cuh with NVRTC where the wheel has no nvcc build.

Users need a GPU, its driver and CuPy (``pip install fastmerge[gpu12]`` or ``[gpu13]``), no CUDA toolkit.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# No contraction: class A operators promise the same bits as on a CPU (docs/numerics.md).
OPTIONS = ("--std=c++17", "--fmad=false")
THREADS = 256  # FM_THREADS in csrc/common/cuda.cuh; no kernel takes more than 48 KiB of shared memory
SOURCES = ("permute", "expert_scatter", "fw_products", "fw_step")


def source_folder() -> Path:
    """csrc/, as package data of a wheel or beside the package in a clone."""
    here = Path(__file__).parent
    return here / "csrc" if (here / "csrc").is_dir() else here.parent / "csrc"


@functools.cache
def source(name: str) -> str:
    """csrc/ops/<name>.cuh with its own headers put in place of their #include lines: what NVRTC compiles."""
    seen: set[Path] = set()

    def expand(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        lines = []
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                lines.append(expand((path.parent / line.split('"')[1]).resolve()))
            elif line != "#pragma once":
                lines.append(line)
        return "\n".join(lines)

    return expand((source_folder() / "ops" / f"{name}.cuh").resolve())


def source_of(kernel: str) -> str:
    """The name of the source that defines a kernel."""
    for name in SOURCES:
        if f"X({kernel}," in source(name):
            return name
    if kernel.startswith("expert_scatter_kernel_"):
        return "expert_scatter"  # made by a macro
    raise ValueError(f"no CUDA source defines a kernel called {kernel}")


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("cupy"), None
    except ImportError as error:
        if error.name == "cupy":
            return None, "CuPy is not installed (pip install fastmerge[gpu12] or fastmerge[gpu13])"
        return None, f"CuPy does not load: {error}"


class Runtime:
    """Kernels compiled at first use, for the device at hand: about a second per source and process."""

    device_type = "cuda"

    def why_not(self, device: torch.device) -> str | None:
        cupy, reason = _load()
        if cupy is None:
            return reason
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return f"CuPy finds no CUDA device: {error}"
        return None if count else "CuPy finds no CUDA device"

    @functools.cache  # noqa: B019 (one Runtime per process)
    def _module(self, name: str, index: int) -> Any:
        cupy = _load()[0]
        # Not cupy.RawModule: it adds -ftz=true, and class A operators keep subnormals (docs/numerics.md).
        compiled, _ = cupy.cuda.compiler.compile_using_nvrtc(source(name), OPTIONS, filename=f"{name}.cu")
        module = cupy.cuda.function.Module()
        module.load(compiled)
        return module

    def launch(self, kernel: str, blocks: int, shared: int, tasks: Tensor, first_block: Tensor, count: int) -> None:
        cupy, index = _load()[0], tasks.device.index or 0
        with cupy.cuda.Device(index), _stream(cupy, torch.cuda.current_stream(tasks.device)):
            function = self._module(source_of(kernel), index).get_function(kernel)
            arguments = (cupy.uint64(tasks.data_ptr()), cupy.uint64(first_block.data_ptr()), cupy.uint32(count))
            function((blocks,), (THREADS,), arguments, shared_mem=shared)


def _stream(cupy: Any, stream: Any) -> Any:
    """A torch stream as CuPy's: by the CUDA stream protocol where both have it (CuPy 14), else by its address."""
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)


def from_tensor(tensor: Tensor) -> Any:
    """A CuPy array over a GPU tensor's memory."""
    cupy, reason = _load()
    if cupy is None:
        raise ImportError(reason)
    return cupy.from_dlpack(tensor)

"""Launches of the CUDA kernels, whoever compiled them: nvcc into the extension module, or NVRTC through CuPy.

Every kernel of csrc/ops/*.cuh takes a table of tasks (one per tensor) and the first block of each; this module builds the
tables, and an :class:`Executor` runs them. Tests put an emulator in its place (:func:`use_executor`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import _cupy, _native

THREADS = _cupy.THREADS
SHARED = 48 * 1024  # bytes any GPU gives a block without being asked twice
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class Executor(Protocol):
    """Runs kernels by name on one kind of device."""

    device_type: str

    def why_not(self, device: torch.device) -> str | None:
        """None when kernels can run on `device`, else the reason."""

    def launch(self, kernel: str, blocks: int, shared: int, tasks: Tensor, first_block: Tensor, count: int) -> None:
        """Queues a launch on the current stream of the tables' device."""


class Compiled:
    """The kernels nvcc compiled into fastmerge._C."""

    device_type = "cuda"

    def why_not(self, device: torch.device) -> str | None:
        reason = _native.why_not()
        if reason is not None:
            return reason
        count, reason = _native.lib().cuda_devices()
        return None if count else f"no CUDA device: {reason}"

    def launch(self, kernel: str, blocks: int, shared: int, tasks: Tensor, first_block: Tensor, count: int) -> None:
        with torch.cuda.device(tasks.device):
            stream = torch.cuda.current_stream(tasks.device).cuda_stream
            _native.lib().cuda_launch(
                kernel, blocks, THREADS, shared, stream, tasks.data_ptr(), first_block.data_ptr(), count
            )


_override: contextvars.ContextVar[Executor | None] = contextvars.ContextVar("fastmerge_cuda", default=None)


@contextlib.contextmanager
def use_executor(executor: Executor) -> Iterator[None]:
    """Within the block the `cuda` backends run on `executor`."""
    token = _override.set(executor)
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def _candidates() -> tuple[Executor, ...]:
    return Compiled(), _cupy.Runtime()


def executor(device: torch.device) -> tuple[Executor | None, str]:
    """The first executor that serves `device`, and why each one before it does not."""
    chosen = _override.get()
    if chosen is not None:
        return chosen, ""
    reasons: list[str] = []
    for candidate in _candidates():
        reason = candidate.why_not(device)
        if reason is None:
            return candidate, "; ".join(reasons)
        reasons.append(f"{'nvcc build' if isinstance(candidate, Compiled) else 'NVRTC through CuPy'}: {reason}")
    return None, "; ".join(reasons)


def why_not(*tensors: Tensor, dtypes: Sequence[torch.dtype] = tuple(NAMES)) -> str | None:
    """The common guard of CUDA backends: strided GPU tensors of one device and a supported dtype, and kernels to run."""
    chosen = _override.get()
    wanted = "cuda" if chosen is None else chosen.device_type
    for t in tensors:
        if t.device.type != wanted:
            return f"a tensor is on {t.device}, the CUDA kernels need GPU memory"
        if t.device != tensors[0].device:
            return f"tensors are on {tensors[0].device} and {t.device}"
        if t.dtype not in dtypes:
            return f"dtype {t.dtype} is not one of {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
        if t.layout != torch.strided:
            return f"layout {t.layout} is not strided"
        if t.is_neg():
            return _native.NEGATED
    if not tensors:
        return "there is no tensor"
    found, reasons = executor(tensors[0].device)
    return None if found is not None else reasons


def upload(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The bytes of a host array on `device`, queued on its current stream."""
    host = torch.from_numpy(np.frombuffer(bytearray(array.tobytes()), dtype=np.uint8))
    return host if device.type == "cpu" else _native.to_device(host, device)


class Launches:
    """Tasks collected by kernel: :meth:`run` launches each kernel once for all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tasks: dict[str, list[tuple[Any, int]]] = {}
        self.shared: dict[str, int] = {}
        self.alive: list[Tensor] = []  # what the tasks' addresses point to, until the launch is queued

    def add(self, kernel: str, task: Any, blocks: int, shared: int = 0) -> None:
        """One record of the kernel's task dtype, and the blocks it takes (none: nothing to do)."""
        if blocks:
            self.tasks.setdefault(kernel, []).append((task, blocks))
            self.shared[kernel] = max(shared, self.shared.get(kernel, 0))

    def keep(self, tensor: Tensor) -> int:
        """The address of a tensor that stays alive until the launch."""
        self.alive.append(tensor)
        return tensor.data_ptr()

    def run(self) -> None:
        """Queues every launch in the order in which the kernels were first added."""
        chosen, reasons = executor(self.device)
        if chosen is None:
            raise RuntimeError(f"CUDA kernels can not run: {reasons}")
        # One copy to the device for the tables of all launches; each table begins at a multiple of 16 bytes.
        tables = bytearray()
        queue: list[tuple[str, int, slice, slice, int]] = []
        for kernel, entries in self.tasks.items():
            places: list[slice] = []
            ends = np.cumsum([0] + [blocks for _, blocks in entries])
            for table in (np.stack([np.asarray(task) for task, _ in entries]), ends[:-1].astype(np.uint32)):
                places.append(slice(len(tables), len(tables) + table.nbytes))
                tables += table.tobytes() + bytes(-table.nbytes % 16)
            queue.append((kernel, int(ends[-1]), places[0], places[1], len(entries)))
        if queue:
            there = upload(np.frombuffer(tables, np.uint8), self.device)
        for kernel, blocks, tasks, first, count in queue:
            chosen.launch(kernel, blocks, self.shared[kernel], there[tasks], there[first], count)
        self.tasks.clear()

"""The only importer of the extension module ``fastmerge._C``.

The module has no torch header: kernels take addresses, sizes and strides as integers and an explicit thread count.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Mirrors enum Dtype in csrc/common/dtype.h.
DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
# Kernels read memory, which holds the other sign then.
NEGATED = (
    "a tensor is negated lazily by torch: its memory holds the values before that (x.resolve_neg() makes it dense)"
)


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fastmerge._C"), None
    except ImportError as error:
        if getattr(error, "name", None) == "fastmerge._C":
            return None, "fastmerge was installed without native kernels (FASTMERGE_BUILD=off, or not built yet)"
        return None, f"fastmerge._C does not load: {error}"


def why_not() -> str | None:
    """None when the native module loads, else the reason it does not."""
    return _load()[1]


def lib() -> Any:
    """The native module; raises ImportError with the reason when there is none."""
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


@functools.cache
def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


_limit = threading.local()


@functools.cache
def _limit_mkl() -> Callable[[int], int] | None:
    """MKL's threads of the calling thread (0: as many as torch's), the previous number being returned; None without MKL.

    torch.set_num_threads would also be the default of every thread that is new to torch meanwhile.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        limit: Callable[[int], int] = library.MKL_Set_Num_Threads_Local
        return limit
    except (OSError, AttributeError):
        return None


@contextlib.contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Within the block, kernels and Fourier transforms called from this thread use at most `count` threads."""
    before, torchs = getattr(_limit, "count", None), torch.get_num_threads()
    mkl = _limit_mkl() if count < torchs else None
    mkls = None
    try:
        _limit.count = count
        mkls = None if mkl is None else mkl(count)
        yield
    finally:
        _limit.count = before
        if mkl is not None and mkls is not None:
            mkl(mkls)
            if torch.get_num_threads() != torchs:  # MKL's transforms set OpenMP's own, too
                torch.set_num_threads(torchs)


def threads() -> int:
    """Threads a kernel may use: torch's intra-op setting, at most the CPUs this process may run on."""
    limit = getattr(_limit, "count", None)
    if limit is not None:
        return int(limit)
    return max(1, min(torch.get_num_threads(), _affinity()))


def each(count: int, task: Callable[[int], None]) -> None:
    """task(i) for i in range(count), on as many Python threads as kernels may use, each with kernels of one thread.

    For tasks of some 100 microseconds that spend them outside the interpreter. The first exception stops the others.
    """
    workers = min(threads(), count)
    if workers <= 1:
        for i in range(count):
            task(i)
        return
    take, errors = itertools.count(), list[BaseException]()

    def run() -> None:
        with limit_threads(1):
            try:
                while not errors and (i := next(take)) < count:  # next() is atomic under the interpreter lock
                    task(i)
            except BaseException as error:
                errors.append(error)

    others = [threading.Thread(target=contextvars.copy_context().run, args=(run,)) for _ in range(workers - 1)]
    started = []
    try:
        for thread in others:
            thread.start()
            started.append(thread)
        run()
    except BaseException as error:  # an interrupt between tasks: the others stop too
        errors.append(error)
        raise
    finally:
        for thread in started:
            thread.join()
    if errors:
        raise errors[0]


_HUGE = 4 << 20  # bytes: below this a new array is not worth the call


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """torch.empty; on the CPU a large one asks for huge pages: first touch of small ones costs more than most kernels."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.device.type == "cpu" and out.nbytes >= _HUGE and why_not() is None:
        lib().advise_huge(out.data_ptr(), out.nbytes)
    return out


_captured: list[torch.Tensor] = []


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a GPU, queued behind pinned memory. A CUDA graph that is being captured copies from that memory again at
    every replay, so that it then stays for good."""
    pinned = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def cpu_why_not(*tensors: torch.Tensor) -> str | None:
    """The common guard of CPU backends: native module loaded, dense CPU tensors of a supported dtype, no gradient."""
    reason = why_not()
    if reason is not None:
        return reason
    for t in tensors:
        if t.device.type != "cpu":
            return f"a tensor is on {t.device}"
        if t.dtype not in DTYPES:
            return f"dtype {t.dtype} is not one of float32, float64, float16, bfloat16"
        if t.layout != torch.strided:
            return f"layout {t.layout} is not strided"
        if t.is_neg():
            return NEGATED
    return None

"""The only importer of ``fastmerge.triton_kernels``: when Triton kernels can run, and the kernels by operator name."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from ._native import DTYPES, NEGATED

MIN_CAPABILITY = (8, 0)  # bfloat16 conversions in hardware


@functools.cache
def _load() -> str | None:
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install 'fastmerge[triton]'; Linux only)"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 3):
        return f"Triton {triton.__version__} is older than 3.3"
    importlib.import_module("fastmerge.triton_kernels._jit")  # repairs the interpreter, or says that it can not
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when this process first loaded them."""
    return _load() is None and bool(importlib.import_module("fastmerge.triton_kernels._jit").INTERPRETING)


@functools.cache
def _device_why_not(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        return f"cuda:{index} has compute capability {capability[0]}.{capability[1]}; the Triton kernels need 8.0"
    return None


def why_not(*tensors: torch.Tensor | None) -> str | None:
    """The common guard of Triton backends: None when the kernels can take these tensors, else the reason."""
    reason = _load()
    if reason is not None:
        return reason
    on = {t.device for t in tensors if t is not None}
    if interpreting():
        for device in on - {torch.device("cpu")}:
            return f"a tensor is on {device}, and TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    else:
        for device in on:
            if device.type != "cuda":
                return (
                    f"a tensor is on {device}: Triton kernels run on a GPU "
                    "(or on CPU tensors, slowly and only to test them, with TRITON_INTERPRET=1 in the environment)"
                )
            if (reason := _device_why_not(device.index or 0)) is not None:
                return reason
    for t in tensors:
        if t is not None and t.dtype not in DTYPES:
            return f"dtype {t.dtype} is not one of float32, float64, float16, bfloat16"
        if t is not None and t.layout != torch.strided:
            return f"layout {t.layout} is not strided"
        if t is not None and t.is_neg():
            return NEGATED
    return None


def kernel(op: str, name: str | None = None) -> Callable[..., Any]:
    """The launcher `name` (default: the operator's) in triton_kernels/<op>.py."""
    launcher: Callable[..., Any] = getattr(importlib.import_module(f"fastmerge.triton_kernels.{op}"), name or op)
    return launcher

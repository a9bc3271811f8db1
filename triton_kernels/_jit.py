"""What every kernel file shares: Triton where there is one, the launch, scalars as bits, tables for many tensors.

Class A operators promise the same bits on every backend, so `launch` forbids fused multiply-add, and scalars travel as
integers: a Python float would reach the kernel as float32 even when it computes in float64.
"""

from __future__ import annotations

import contextlib
import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmerge import _native

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETING = bool(triton.knobs.runtime.interpret)
except ImportError:  # the files stay importable, so that they can be listed and read
    triton = tl = None
    INTERPRETING = False

    def jit(fn=None, **_):  # type: ignore[no-untyped-def]
        return fn if fn is not None else (lambda f: f)


if INTERPRETING:
    from . import _interpreter

    _interpreter.repair()

MAX_UNROLLED = 4  # models taken as kernel arguments, all loads in flight; beyond, a table and a loop (registers)


@functools.lru_cache(maxsize=64)
def _target(driver: Any, _device: int) -> Any:
    return driver.get_current_target()


def target() -> Any:
    """The GPU that Triton compiles for: .backend ("cuda" or "hip"), .arch, .warp_size."""
    driver = triton.runtime.driver.active
    return _target(driver, driver.get_current_device())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (triton.cdiv takes 6 microseconds on the host.)"""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next power of two from n > 0 on."""
    return 1 << (n - 1).bit_length()


def block_size(compute: torch.dtype) -> int:
    """Elements per program of a streaming kernel: 8 a thread, so 16 bytes of a 16-bit stream; 4 warps of them.

    In the interpreter a program costs a millisecond, so blocks are large there.
    """
    if INTERPRETING:
        return 1 << 16
    return 4 * int(target().warp_size) * (4 if compute == torch.float64 else 8)


def warps(nvidia: int) -> int:
    """Warps of 32 threads as warps of this GPU: 64 threads on AMD."""
    return nvidia if INTERPRETING else max(1, nvidia * 32 // int(target().warp_size))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **meta: Any) -> None:
    """Runs `kernel` over `grid` on the device of its tensors, without contraction.

    `maxnreg` in `meta` (registers a thread, for occupancy) is for NVIDIA only.
    """
    if 0 in grid:
        return
    assert max(grid[1:], default=0) <= 65535, (
        f"{grid} is more than a GPU's grid takes"
    )  # seen where there is no GPU, too
    if INTERPRETING:
        import numpy as np

        with np.errstate(all="ignore"):  # Inf - Inf, overflow to Inf and wrapping integers are what the GPU does too
            kernel[grid](*args, **meta)
        return
    if "maxnreg" in meta and target().backend != "cuda":
        del meta["maxnreg"]
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=False, **meta)


def bits(value: float, compute: torch.dtype) -> int:
    """The bits of `value` rounded to the compute dtype (float32 or float64), as a signed integer for `scalar`."""
    if compute == torch.float64:
        return int(struct.unpack("q", struct.pack("d", value))[0])
    try:
        return int(struct.unpack("i", struct.pack("f", value))[0])
    except OverflowError:  # to infinity, as a cast does
        return int(struct.unpack("i", struct.pack("f", math.copysign(math.inf, value)))[0])


def tl_dtype(dtype: torch.dtype) -> Any:
    return {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
    }[dtype]


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Arithmetic is done in float32, or in float64 when an input is float64."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def upload(values: Sequence[int] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table on the device, copied from pinned memory so that the host does not wait."""
    table = torch.as_tensor(values, dtype=dtype, device="cpu")
    return _native.to_device(table, device) if device.type == "cuda" else table


@jit
def scalar(bits, COMPUTE: tl.constexpr):
    """The float a launcher packed with `bits`."""
    if COMPUTE.primitive_bitwidth == 64:
        value = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        value = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return value


@jit
def divide(x, y, COMPUTE: tl.constexpr):
    """IEEE division; Triton's own `/` is approximate in float32."""
    if COMPUTE.primitive_bitwidth == 64:
        q = x / y
    else:
        q = tl.math.div_rn(x, y)
    return q


@jit
def narrow(x, DTYPE: tl.constexpr):
    """Rounds to DTYPE, to nearest even; float64 reaches a 16-bit type through float32, as torch does."""
    if x.dtype == tl.float64 and DTYPE.primitive_bitwidth == 16:
        y = x.to(tl.float32).to(DTYPE)
    else:
        y = x.to(DTYPE)
    return y


@jit
def read(ptr, offsets, left, COMPUTE: tl.constexpr, MASKED: tl.constexpr):
    """Elements of a block, converted to the compute dtype; lanes past `left` read 0.

    A full block loads without a mask: the loads are then 128 bits wide whatever the number of elements is.
    """
    if MASKED:
        x = tl.load(ptr + offsets, mask=offsets < left, other=0.0)
    else:
        x = tl.load(ptr + offsets)
    return x.to(COMPUTE)


@jit
def write(ptr, offsets, x, left, MASKED: tl.constexpr):
    y = narrow(x, ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + offsets, y, mask=offsets < left)
    else:
        tl.store(ptr + offsets, y)


@jit
def address(table, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer read from a table of addresses; ALIGNED promises 16 bytes, which is what wide loads need."""
    ptr = tl.load(table).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


def aligned(*tensors: Tensor | None) -> bool:
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def block_map(sizes: Sequence[int], block: int) -> tuple[Tensor, list[int]]:
    """One grid over many tensors: which tensor each program works on (int32), and each tensor's first program."""
    if len(sizes) == 1:
        return torch.zeros(-(-sizes[0] // block), dtype=torch.int32, device="cpu"), [0]
    counts = torch.tensor([-(-n // block) for n in sizes], device="cpu")
    owner = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32, device="cpu"), counts)
    return owner, (counts.cumsum(0) - counts).tolist()

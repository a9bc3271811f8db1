"""The tests of the tests: the interpreter's repair against torch, and planted bugs that the guard must catch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastmerge.triton_kernels import _interpreter
from fastmerge.triton_kernels._jit import INTERPRETING
from kernels.triton_guard import OutOfBounds, Race, memory_guard
from triton.runtime.errors import InterpreterError


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
    tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def careless_add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.load(x_ptr + i))


@triton.jit
def past_the_end_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i <= n, other=0.0), mask=i < n)


@triton.jit
def overlapping_stores_kernel(y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, i.to(tl.float32))


@triton.jit
def reads_its_neighbour_kernel(y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(y_ptr + i + 1, mask=i + 1 < n, other=0.0), mask=i < n)


@triton.jit
def counts_and_reads_kernel(count_ptr, y_ptr):
    tl.atomic_add(count_ptr, 1)
    tl.store(y_ptr + tl.program_id(0), tl.load(count_ptr))


@triton.jit
def every_other_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + 2 * i))


def test_this_process_interprets():
    assert INTERPRETING


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_conversions_are_torchs(source, target):
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    if source == torch.float32:  # every 16-bit prefix, with the rest at, just below and just above the half
        x = torch.cat([(bits << 16) | tail for tail in (0, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001)])
        x = x.view(torch.float32)
    else:
        x = bits.to(torch.int16).view(source)
    y = torch.empty(x.shape, dtype=target)
    with np.errstate(all="ignore"):
        cast_kernel[(1,)](x, y, x.numel(), BLOCK=1 << 19)
    want = x.float().to(target)
    assert torch.equal(y.isnan(), want.isnan())
    view = torch.int32 if target == torch.float32 else torch.int16
    assert torch.equal(torch.where(want.isnan(), 0, y).view(view), torch.where(want.isnan(), 0, want).view(view))


def test_arithmetic_on_bf16_is_refused():
    x = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="convert to float32"):
        careless_add_kernel[(1,)](x, torch.empty_like(x), BLOCK=8)


def test_an_unknown_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "99.0.0")
    monkeypatch.delattr(triton.runtime.interpreter.InterpreterBuilder, "fastmerge_repaired")
    with pytest.raises(RuntimeError, match=r"99\.0\.0"):
        _interpreter.repair()


def test_planted_out_of_bounds_is_caught():
    x, y = torch.zeros(100), torch.empty(100)
    with memory_guard(), pytest.raises(InterpreterError, match=r"OutOfBounds.*400 bytes from the start"):
        past_the_end_kernel[(2,)](x, y, 100, BLOCK=64)
    assert OutOfBounds.__mro__[1] is AssertionError


def test_planted_races_are_caught():
    with memory_guard(), pytest.raises(Race, match="overlapping_stores_kernel"):
        overlapping_stores_kernel[(3,)](torch.empty(200), BLOCK=64)
    with memory_guard(), pytest.raises(Race, match="reads_its_neighbour"):
        reads_its_neighbour_kernel[(2,)](torch.zeros(128), 128, BLOCK=64)
    with memory_guard(), pytest.raises(Race, match="counts_and_reads"):
        counts_and_reads_kernel[(2,)](torch.zeros(1, dtype=torch.int32), torch.empty(2, dtype=torch.int32))


def test_one_program_may_touch_what_it_stores():
    with memory_guard() as guard:
        reads_its_neighbour_kernel[(1,)](torch.zeros(60), 60, BLOCK=64)
    assert guard.launches == ["reads_its_neighbour_kernel"]


def test_traffic_is_counted():
    x, y = torch.zeros(4096), torch.empty(4096, dtype=torch.bfloat16)
    with memory_guard() as guard:
        cast_kernel[(4,)](x, y, 4096, BLOCK=1024)
    assert (guard.bytes_loaded, guard.bytes_stored) == (4096 * 4, 4096 * 2)
    assert guard.full_sector_share() > 0.99
    with memory_guard() as guard:
        every_other_kernel[(1,)](x, torch.empty(2048), BLOCK=2048)
    assert guard.full_sector_share() < 0.6

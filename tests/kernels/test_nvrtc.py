"""NVRTC compiles every CUDA kernel for real GPUs, from the sources and options that CuPy would give it."""

import json
import re

import pytest
from kernels import cuda_nvrtc

from fastmerge import _cuda, _cupy, _native

TARGETS = [f"sm_{arch}" for arch in cuda_nvrtc.TARGETS]


@pytest.fixture(scope="module")
def table():
    return cuda_nvrtc.table()


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills_and_contraction(table, target):
    rows = table[target]
    assert len(rows) >= 40
    for kernel, row in rows.items():
        assert row["spills"] == 0, (kernel, row)
        assert row["fma"] == 0, (kernel, row)  # class A: a contracted product would give other bits
        assert row["ftz"] == 0, (kernel, row)  # and so would a subnormal flushed to zero
        assert row["occupancy"] >= 0.5, (kernel, row)
        wide = re.search(r"_16$|merge_\w+_(f32|bf16|f16)$|step|products|columns", kernel)
        if wide and not kernel.startswith("permute_cycles_kernel_2"):
            assert row["wide_loads"] > 0, (kernel, row)


def test_no_kernel_got_worse(table):
    """After a change that is meant: python tests/kernels/cuda_nvrtc.py --write, and look at the difference."""
    assert not cuda_nvrtc.compare(table, json.loads(cuda_nvrtc.TABLE.read_text()))


def test_the_comparison_sees_a_worse_kernel(table):
    worse = {t: {k: dict(row) for k, row in rows.items()} for t, rows in table.items()}
    worse["sm_90"]["fw_totals_kernel"]["registers"] += 1
    worse["sm_80"]["permute_rows_kernel_16"]["spills"] = 8
    del worse["sm_120"]["fw_step_kernel_f32_f32"]
    assert len(cuda_nvrtc.compare(worse, table)) == 3


def test_every_kernel_is_found_by_name(table):
    for kernel in table["sm_80"]:
        assert f"{kernel.split('_kernel')[0]}" in _cupy.source(_cupy.source_of(kernel))
    with pytest.raises(ValueError, match="called nothing"):
        _cupy.source_of("nothing")


def test_a_source_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"sm_90: [\s\S]*undefined_name"):
        cuda_nvrtc.compile_source("broken", 90, 'extern "C" __global__ void k(int* p) { *p = undefined_name; }')


def test_the_build_has_all_kernels_or_none(table):
    built = _native.lib().cuda_kernels()
    assert built == [] or set(built) == set(table["sm_80"])


def test_without_a_gpu_both_ways_say_why():
    import torch

    if torch.cuda.is_available():
        assert _cuda.executor(torch.device("cuda"))[0] is not None
        return
    found, reasons = _cuda.executor(torch.device("cuda"))
    assert found is None
    assert re.search("nvcc build: .+; NVRTC through CuPy: .+", reasons)

"""The CUDA kernels in the emulator: results, traffic; and the same launches under AddressSanitizer and ThreadSanitizer."""

import pytest
import torch
from checks import assert_same_bits, check_op
from kernels.emulated import Emulator

from fastmerge import _cuda
from fastmerge.ops import expert_scatter, fw_lmo, fw_products, fw_step, permute, permute_merge

OPS = [permute, permute_merge, expert_scatter, fw_products, fw_lmo, fw_step]


@pytest.mark.parametrize("schedule", [0, 2])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_agree_with_the_reference(op, schedule):
    with _cuda.use_executor(emulator := Emulator(schedule=schedule)):
        assert check_op(op) > 50
    assert emulator.launches

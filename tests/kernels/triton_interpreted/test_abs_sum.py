from __future__ import annotations

import torch
from checks import check_op
from kernels.triton_guard import memory_guard

from fastmerge import _triton
from fastmerge.ops import abs_sum


def test_agrees_with_the_reference():
    assert check_op(abs_sum, backends=["triton"]) >= 20


def test_the_base_is_read_once_and_accesses_are_clean():
    base, *models = (torch.randn(70_001).bfloat16() for _ in range(4))
    with memory_guard(base, *models) as guard:
        _triton.kernel("abs_sum")(base, models)
    assert guard.touched(base) == base.numel()
    assert guard.bytes_moved() <= 1.05 * 4 * 2 * base.numel()

from __future__ import annotations

import pytest
import torch
from checks import assert_same_bits, check_op
from kernels.triton_guard import memory_guard

from fastmerge import _triton
from fastmerge.ops import random_mask
from fastmerge.ops.philox import draw_key, draw_limit, draws

kernel = _triton.kernel("random_mask")


def test_agrees_with_the_reference_bit_for_bit():
    assert check_op(random_mask, backends=["triton"]) >= 60


@pytest.mark.parametrize(("n", "offset"), [(1, 0), (1024, 0), (3000, 0), (1000, 5), (2050, 8 * 2**32 - 1001)])
def test_bits_do_not_depend_on_the_block_and_accesses_are_clean(n, offset):
    out = torch.full((n,), 7, dtype=torch.uint8).view(torch.bool)
    key = draw_key(3, "w")
    with memory_guard() as guard:
        kernel(out, out, (draw_limit(0.3), 0, 1), key=key, stream=4, offset=offset, block=1024)
    assert torch.equal(out, draws(n, key=key, stream=4, offset=offset) < draw_limit(0.3))
    assert guard.bytes_moved() == n  # nothing is read


def test_the_second_digit_decides_ties_of_the_first():
    key, n = draw_key(0, "ties"), 1 << 17
    want = draws(n, key=key, stream=0)
    some = int(want[12345])  # a limit equal to a draw: that element is out, and in with one more
    out = torch.empty(n, dtype=torch.bool)
    for limit in (some, some + 1, (some >> 16) << 16):
        kernel(out, out, (limit, 0, 1), key=key, stream=0, offset=0)
        assert torch.equal(out, want < limit)
        assert bool(out[12345]) == (some < limit)


def test_traffic_and_sectors():
    x = torch.randn(40_001).bfloat16()
    out = torch.empty_like(x)
    with memory_guard() as guard:
        kernel(x, out, (draw_limit(0.3), 0, 1), key=(1, 2), stream=0, offset=0, factor=1 / 0.3, block=2048)
    assert guard.bytes_moved() <= 1.05 * 2 * 2 * x.numel()
    assert guard.full_sector_share() >= 0.95
    assert_same_bits(
        random_mask(x, 0.3, rescale="density", backend="triton"),
        random_mask(x, 0.3, rescale="density", backend="reference"),
    )

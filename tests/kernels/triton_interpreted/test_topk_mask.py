from __future__ import annotations

import pytest
import torch
from checks import check_op
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_guard import memory_guard

from fastmerge import _triton
from fastmerge.ops import topk_mask
from fastmerge.ops.threshold import kept_count

kernel = _triton.kernel("topk_mask")


def test_agrees_with_the_reference_bit_for_bit():
    assert check_op(topk_mask, backends=["triton"]) >= 90


def check(x: torch.Tensor, density: float, block: int | None = None) -> None:
    out = torch.full(x.shape, 7, dtype=torch.uint8).view(torch.bool)
    kernel(x, kept_count(density, x.shape[-1]), out, block=block)
    assert torch.equal(out, topk_mask(x, density, dim=-1, backend="reference"))


@pytest.mark.parametrize("block", [512, 4096])
@pytest.mark.parametrize("kind", ["normal", "three values", "constant", "bfloat16"])
def test_selection_over_many_blocks(kind, block):
    x = torch.randn(1, 6000, generator=torch.Generator().manual_seed(1))
    if kind == "three values":
        x = x.sign() * (x.abs() > 0.6)
    elif kind == "constant":
        x = torch.full_like(x, -2.5)  # more candidates than there is room for: the data is read again
    elif kind == "bfloat16":
        x = x.bfloat16()
    for density in (0.001, 0.2, 0.9):
        check(x, density, block)


def test_long_rows_are_segments_of_one_launch():
    x = torch.randn(3, 17_000, generator=torch.Generator().manual_seed(2))
    with memory_guard(x) as guard:
        check(x, 0.1)
    assert guard.launches.count("copy_candidates_kernel") == 1


@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), float("nan"), 1e-42]), min_size=2, max_size=40),
    density=st.floats(0.01, 0.99),
)  # fmt: skip
def test_few_values_many_ties(values, density):
    check(torch.tensor([values]), density)  # one row in registers
    check(torch.tensor([values * 200])[:, :4200], density, 1024)


def test_accesses_are_clean_and_the_traffic_is_three_reads_and_the_mask():
    x = torch.randn(1, 1 << 20, generator=torch.Generator().manual_seed(3))
    out = torch.empty(x.shape, dtype=torch.bool)
    with memory_guard(x) as guard:
        kernel(x, kept_count(0.2, x.numel()), out)
    assert guard.bytes_moved() - out.numel() <= 3.15 * 4 * x.numel()
    assert guard.touched(x) == 3 * x.numel()


def test_a_row_in_registers_is_read_once():
    x = torch.randn(7, 1000)
    out = torch.empty(x.shape, dtype=torch.bool)
    with memory_guard() as guard:
        kernel(x, 100, out)
    assert guard.bytes_moved() == 7 * 1000 * (4 + 1)

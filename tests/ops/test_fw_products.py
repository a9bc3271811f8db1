import pytest
import torch
from checks import check_op

from fastmerge.ops import fw_products


def test_backends_agree_with_the_reference():
    assert check_op(fw_products, backends=["cpu"]) >= 45


def test_golden_table():
    g = torch.tensor([1.0, 2.0, -1.0])
    got = fw_products(g, [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 0.5, 4.0])])
    assert got.dots.tolist() == [2.0, -3.0]
    assert got.sqnorms.tolist() == [3.0, 16.25]
    assert got.grad_sqnorm.item() == 6.0
    assert got.dots.dtype == torch.float64


def test_without_norms():
    got = fw_products(torch.ones(3), [torch.ones(3)], norms=False)
    assert got.dots.tolist() == [3.0]
    assert bool(got.sqnorms.isnan().all())


def test_float64_totals_of_float32_blocks():
    # A float32 running sum would stop growing at 2^24.
    ones = torch.ones(1 << 25, dtype=torch.bfloat16)
    assert fw_products(ones, [ones]).dots.item() == float(1 << 25)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="empty"):
        fw_products(torch.zeros(2), [])
    with pytest.raises(ValueError, match=r"candidates\[1\] has shape"):
        fw_products(torch.zeros(2), [torch.zeros(2), torch.zeros(3)])
    carry = fw_products(torch.zeros(2), [torch.zeros(2)])
    with pytest.raises(ValueError, match="carry is of 1"):
        fw_products(torch.zeros(2), [torch.zeros(2)] * 2, carry=carry)

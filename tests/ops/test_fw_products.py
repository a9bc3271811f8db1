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


def in_fixed_order(a: torch.Tensor, b: torch.Tensor) -> float:
    """<a, b> as csrc/common/block_sum.h adds it up: tiles of 2048, 64 lanes, blocks of 65536, float64 totals."""
    products = torch.nn.functional.pad(a.float() * b.float(), (0, -len(a) % 65536)).view(-1, 32, 32, 64)
    total = 0.0
    for block in products:
        lanes = torch.zeros(64)
        for rows in block:
            tile = torch.zeros(64)
            for row in rows:
                tile = tile + row
            lanes = lanes + tile
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = lanes[:half] + lanes[half:]
        total += lanes.item()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [65536 + 2048 + 64, 2048 + 65])
def test_sums_have_one_order_whatever_the_machine_and_the_company(dtype, size):
    generator = torch.Generator().manual_seed(size)
    g = torch.randn(size, generator=generator).to(dtype)
    types = [dtype] * 7 + [torch.float32, torch.float16, dtype]  # four together, three, one at a time
    candidates = [torch.randn(size, generator=generator).to(t) for t in types]
    dots = [in_fixed_order(g, c) for c in candidates]
    assert fw_products(g, candidates, backend="cpu", norms=False).dots.tolist() == dots
    both = fw_products(g, candidates, backend="cpu")
    assert both.dots.tolist() == dots
    assert both.sqnorms.tolist() == [in_fixed_order(c, c) for c in candidates]
    assert both.grad_sqnorm.item() == in_fixed_order(g, g)

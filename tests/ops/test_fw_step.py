import pytest
import torch
from checks import check_op

from fastmerge.ops import fw_products, fw_step


def test_backends_agree_with_the_reference():
    assert check_op(fw_step, backends=["cpu"]) >= 24


def test_golden_table():
    theta, s = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert fw_step([theta], [s], 0.25) is None
    assert theta.tolist() == [1.5, 1.0]
    fw_step([theta], [None], 0.5)
    assert theta.tolist() == [0.75, 0.5]


def test_products_of_the_step():
    theta, s, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0]), torch.tensor([1.0, 1.0])
    other = torch.zeros(3)
    got = fw_step([theta, other], [s, None], [0.25, 1.0], gradients=[g, torch.ones(3)])
    assert got.tolist() == [[-2.0, 20.0], [0.0, 0.0]]
    assert theta.tolist() == [1.5, 1.0]


@pytest.mark.parametrize("backend", ["reference", None])
def test_low_precision_is_refused_with_the_reason(backend):
    theta = torch.zeros(2).bfloat16()
    with pytest.raises(TypeError, match="allow_low_precision"):
        fw_step([theta], [theta], 0.1, backend=backend)


@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_input_changes_nothing(backend):
    theta = torch.zeros(2)
    with pytest.raises(ValueError, match="1 params, 2 vertices"):
        fw_step([theta], [theta, theta], 0.1, backend=backend)
    with pytest.raises(ValueError, match=r"tensor 1 of vertices\[0\] has shape"):
        fw_step([theta, torch.zeros(3)], [torch.ones(2), torch.zeros(4)], 0.1, backend=backend)
    with pytest.raises(ValueError, match="2 entries for 1"):
        fw_step([theta], [torch.ones(2)], [0.1, 0.2], backend=backend)
    assert theta.tolist() == [0, 0]


@pytest.mark.parametrize("vertex", [torch.float32, torch.bfloat16, torch.float16])
def test_products_do_not_change_the_step(vertex):
    generator = torch.Generator().manual_seed(0)
    theta, g = torch.randn(2, 2048 + 65, generator=generator)
    s = torch.randn(2048 + 65, generator=generator).to(vertex)
    alone, beside, reference = theta.clone(), theta.clone(), theta.clone()
    fw_step([alone], [s], 0.3, backend="cpu")
    got = fw_step([beside], [s], 0.3, gradients=[g], backend="cpu")
    fw_step([reference], [s], 0.3, backend="reference")
    assert torch.equal(alone, reference)
    assert torch.equal(beside, reference)
    products = fw_products(g, [s.float() - theta], backend="cpu")
    assert got.tolist() == [[products.dots.item(), products.sqnorms.item()]]

import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge.ops import permute


def test_backends_agree_with_the_reference():
    assert check_op(permute, backends=["cpu"]) >= 120


def test_golden_table():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert permute(x, {1: [2, 0, 1]}).tolist() == [[3, 1, 2], [6, 4, 5]]
    assert permute(x, {0: [1, 0], 1: [2, 1, 0]}).tolist() == [[6, 5, 4], [3, 2, 1]]
    heads = torch.arange(6.0)  # two heads of three
    assert permute(heads, {0: [1, 0]}).tolist() == [3, 4, 5, 0, 1, 2]
    assert permute(x, {-2: torch.tensor([1, 0], dtype=torch.int32)}).tolist() == [[4, 5, 6], [1, 2, 3]]


def test_numpy_index_keeps_tensors():
    x = torch.arange(4.0)
    got = permute(x, {0: torch.tensor([3, 2, 1, 0]).numpy()})
    assert isinstance(got, torch.Tensor)
    assert got.tolist() == [3, 2, 1, 0]


def test_the_inverse_undoes_it():
    g = torch.Generator().manual_seed(0)
    x, p, q = torch.randn(50, 40, 3, generator=g), torch.randperm(50, generator=g), torch.randperm(40, generator=g)
    there = permute(x, {0: p, 1: q})
    assert_same_bits(permute(there, {0: torch.argsort(p), 1: torch.argsort(q)}), x)


@pytest.mark.parametrize("shape", [(96, 64), (96,), (96, 5, 3)])
def test_in_place(shape):
    g = torch.Generator().manual_seed(0)
    x, p = torch.randn(shape, generator=g), torch.randperm(96, generator=g)
    want = permute(x, {0: p})
    assert permute(x, {0: p}, out=x) is x
    assert_same_bits(x, want)


@pytest.mark.parametrize(
    ("perms", "match"),
    [
        ({0: [0, 0, 1, 2]}, "'w', axis 0: not a permutation of 0..3: 0 appears at entries 0 and 1"),
        ({0: [0, 1, 2, 4]}, "group 'p3', tensor 'w', axis 0: .*entry 3 is 4"),
        ({0: [-1, 1, 2, 3]}, "entry 0 is -1"),
        ({2: [0]}, r"axis 2: the tensor has shape \(4, 6\)"),
        ({1: [0, 1, 2, 3]}, "4 entries for 6 slices"),
        ({1: [1, 0], -1: [1, 0]}, "given twice"),
        ({1: torch.tensor([0.0])}, "int64 or int32"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_index_is_named_before_anything_is_written(perms, match, backend):
    x, out = torch.zeros(4, 6), torch.full((4, 6), 7.0)
    with pytest.raises((ValueError, TypeError), match=match):
        permute(x, perms, out=out, group="p3", names="w", backend=backend)
    assert bool((out == 7.0).all())


def test_bad_tensor_is_named():
    with pytest.raises(TypeError, match="int64"):
        permute(torch.zeros(3, dtype=torch.int64), {0: [0, 1, 2]})
    with pytest.raises(ValueError, match="2 tensors, but 1 perms"):
        permute([torch.zeros(2), torch.zeros(2)], [{0: [0, 1]}])


def test_the_reference_is_differentiable():
    x = torch.randn(4, requires_grad=True)
    (permute(x, {0: [3, 0, 1, 2]}) * torch.arange(4.0)).sum().backward()
    assert x.grad.tolist() == [1, 2, 3, 0]

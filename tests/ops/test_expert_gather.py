import pytest
import torch
from checks import assert_same_bits, check_op
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import _native
from fastmerge.ops import expert_gather, topk_mask


def test_backends_agree_with_the_reference():
    assert check_op(expert_gather, backends=["cpu"]) >= 60


def test_golden_table():
    base = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    model = torch.tensor([[1.5, -1.0, 3.0, 1.0], [1.0, -1.0, 1.0, 0.5]])
    index, value = expert_gather(base, model, 0.5)
    assert index.tolist() == [1, 2, 4, 5]  # -2 and 2; of three ones the first two
    assert value.tolist() == [-2, 2, 1, -1]
    index, value = expert_gather(None, torch.tensor(-3.0), 0.1, offset=7)
    assert (index.tolist(), value.tolist()) == ([7], [-3])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 300), st.floats(0.001, 1.0), st.sampled_from([1, 3, 1000]), st.integers(0, 999)
)
def test_the_entries_are_those_of_topk_mask(rows, length, density, levels, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-levels, levels + 1, (rows, length), generator=g) / 7.0
    x *= torch.randint(0, 3, (rows, 1), generator=g)  # rows of zeros, too
    index, value = expert_gather(None, x, density)
    assert torch.equal(index, topk_mask(x, density, dim=-1).view(-1).nonzero().squeeze(1))
    assert_same_bits(value, x.view(-1)[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_density_of_one_keeps_zeros_too(dtype):
    x = torch.tensor([[0.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, -0.0, 1.0, 0.0]], dtype=dtype)
    index, value = expert_gather(None, x, 1.0)
    assert index.tolist() == list(range(12))
    assert_same_bits(value, x.to(value.dtype).view(-1))


def test_threads_give_the_same_entries():
    x = torch.randn(700, 1000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 5, 700)[:, None]
    index, value = expert_gather(None, x, 0.01)
    with _native.limit_threads(1):
        one = expert_gather(None, x, 0.01)
    assert torch.equal(index, one[0])
    assert_same_bits(value, one[1])


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ((None, torch.zeros(3, dtype=torch.int32), 0.1), TypeError, "model has dtype torch.int32"),
        ((torch.zeros(3), torch.zeros(4), 0.1), ValueError, r"model\[0\] has shape"),
        ((None, torch.zeros(3), 1.5), ValueError, "density 1.5"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_input_is_named(args, error, match, backend):
    with pytest.raises(error, match=match):
        expert_gather(*args, backend=backend)

import pytest
import torch
from checks import check_op

from fastmerge.ops import expert_scatter


def test_backends_agree_with_the_reference():
    assert check_op(expert_scatter, backends=["cpu"]) >= 80


def test_golden_table():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    saved = expert_scatter(x, torch.tensor([0, 3]), torch.tensor([10.0, 20.0]), scale=0.5)
    assert x.tolist() == [[6, 2], [3, 14]]
    assert saved.tolist() == [1, 4]
    expert_scatter(x, torch.tensor([1]), torch.tensor([3.0]), scale=2.0, mode="override")
    assert x.tolist() == [[6, 6], [3, 14]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["add", "override"])
def test_undo_is_exact(dtype, mode):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 50, generator=g).to(dtype)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    before = x.clone()
    index = torch.cat([torch.arange(3), 3 + torch.randperm(1997, generator=g)[:200].sort().values])
    saved = expert_scatter(x, index, torch.randn(203, generator=g).to(dtype), scale=1e3, mode=mode)
    assert not torch.equal(x, before)
    expert_scatter(x, index, saved, mode="override")
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(x.view(bits), before.view(bits))  # NaN payloads too


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ([2, 1], "strictly increasing: entry 0 is 2, entry 1 is 1"),
        ([1, 1], "strictly increasing"),
        ([-1, 2], r"spans -1\.\.2"),
        ([0, 6], r"spans 0\.\.6, but the tensor has 6"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_positions_change_nothing(index, match, backend):
    ok, x = torch.zeros(4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=match):
        expert_scatter(
            [ok, x], [torch.tensor([0, 1]), torch.tensor(index)], [torch.ones(2), torch.ones(2)], backend=backend
        )
    assert ok.tolist() == [0] * 4
    assert x.tolist() == [[0] * 3] * 2


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((torch.zeros(3), torch.tensor([0]), torch.zeros(2)), {}, "two vectors of one length"),
        ((torch.zeros(3), torch.tensor([0.0]), torch.zeros(1)), {}, r"index\[0\] has dtype torch.float32"),
        ((torch.zeros(3), torch.tensor([0]), torch.zeros(1)), {"mode": "sum"}, "mode 'sum'"),
        ((torch.zeros(3).int(), torch.tensor([0]), torch.zeros(1)), {}, "int32"),
        (([torch.zeros(3)], [], []), {}, "1 tensors, 0 indices"),
    ],
)
def test_bad_input_is_named(args, kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match):
        expert_scatter(*args, **kwargs)

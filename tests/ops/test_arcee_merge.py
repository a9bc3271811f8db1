import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import arcee_merge


def test_backends_agree_with_the_reference():
    assert check_op(arcee_merge, backends=["cpu"]) >= 30


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base, other = torch.ones(2, 2), torch.tensor([[2.0, -1.0], [5.0, 0.5]])
    divergence = torch.tensor([0.5, 0.125])
    # importances 0.5, 1; 0.5, 0.0625
    assert arcee_merge(base, other, divergence, 0.5, backend=backend).tolist() == [[2.0, -1.0], [5.0, 1.0]]
    assert arcee_merge(base, other, divergence, 0.75, backend=backend).tolist() == [[1.0, -1.0], [1.0, 1.0]]
    assert arcee_merge(base, other, divergence, float("nan"), backend=backend).tolist() == base.tolist()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_pieces_do_not_change_a_bit(threads, monkeypatch):
    g = torch.Generator().manual_seed(1)
    base, other = (torch.randn(1001, 140, generator=g).bfloat16() for _ in range(2))
    divergence = torch.rand(1001, generator=g)
    want = arcee_merge(base, other, divergence, 0.4, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(arcee_merge(base, other, divergence, 0.4), want)
    flat = base.flatten(), other.flatten()
    pieces = [
        arcee_merge(*(x[a:b] for x in flat), divergence, 0.4, row=140, offset=a)
        for a, b in ((0, 77), (77, 90_001), (90_001, 140_140))
    ]
    assert_same_bits(torch.cat(pieces).view_as(want), want)
    assert_same_bits(arcee_merge(base, other, divergence, 0.4, out=base), want)


def test_large_results_go_past_the_cache_with_the_same_bits():
    g = torch.Generator().manual_seed(2)
    base, other = (torch.randn(2100, 1001, generator=g) for _ in range(2))
    divergence = torch.rand(2100, generator=g)
    want = arcee_merge(base, other, divergence, 0.4, backend="reference")
    assert_same_bits(arcee_merge(base, other, divergence, 0.4), want)


def test_bad_input_is_named():
    x, d = torch.zeros(4, 3), torch.zeros(4)
    with pytest.raises(ValueError, match="has 3 rows, 4 are needed"):
        arcee_merge(x, x, d[:3], 0.0)
    with pytest.raises(ValueError, match="out has shape"):
        arcee_merge(x, x, d, 0.0, out=torch.zeros(3))

import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import zip_match


def test_backends_agree_with_the_reference():
    assert check_op(zip_match, backends=["cpu"]) >= 50


def test_golden_table():
    # features a0 a1 | b0 b1: a1-b0 are most alike, then a0-b1
    s = torch.tensor([[1.0, 0.1, 0.2, 0.5], [0.1, 1.0, 0.9, 0.3], [0.2, 0.9, 1.0, 0.0], [0.5, 0.3, 0.0, 1.0]])
    got = zip_match(s)
    assert got.label.tolist() == [0, 1, 1, 0]
    assert got.score.tolist() == pytest.approx([0.9, 0.5])
    assert got.merge.tolist() == [[0.5, 0], [0, 0.5], [0, 0.5], [0.5, 0]]
    assert got.unmerge.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]


def test_damping_and_complete_linkage():
    # a0-a1 merge first (0.9); their similarity to b0 becomes 0.5 * min(0.8, 0.6) = 0.3 < 0.35 of b0-b1
    s = torch.tensor([[0, 0.9, 0.8, 0], [0.9, 0, 0.6, 0], [0.8, 0.6, 0, 0.35], [0, 0, 0.35, 0]])
    assert zip_match(s).label.tolist() == [0, 0, 1, 1]
    assert zip_match(s, alpha=1.0).label.tolist() == [0, 0, 0, 1]
    # a budget of int(2 / 2 * 1) = 1 merge within a model is spent by the first; without damping b0-b1 would be allowed
    assert zip_match(s, alpha=1.0).score.tolist() == pytest.approx([0.9, 0.6])


def test_ties_go_to_the_first_pair_in_row_major_order():
    got = zip_match(torch.ones(6, 6), alpha=1.0, budget=100.0)
    assert got.label.tolist() == [0, 0, 0, 0, 1, 2]
    got = zip_match(torch.ones(6, 6), alpha=0.5)  # the merged feature is damped: the next pair is (a2, b0)
    assert got.label.tolist() == [0, 0, 1, 1, 2, 2]


def test_alpha_zero_never_meets_a_model_again():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 50, generator=g)
    got = zip_match(torch.corrcoef(x), alpha=0.0, budget=0.0)
    parts = [torch.nonzero(got.label == j).flatten().tolist() for j in range(40)]
    # at most one merge inside a model happens before its budget of 0 is noticed
    assert sum(len(p) == 2 and p[0] < 40 <= p[1] for p in parts) >= 36
    assert all(len(p) <= 3 for p in parts)


@pytest.mark.parametrize("n", [70, 140])
def test_large_matrices_match_the_published_loop(n):
    """Several levels of the tree; every merge in the same order."""
    x = torch.randn(2 * n, 40, generator=torch.Generator().manual_seed(n))
    s = torch.corrcoef(x)
    s = s.triu(1) + s.triu(1).T
    want = zip_match(s, backend="reference", dense=False)
    got = zip_match(s, backend="cpu", dense=False)
    assert_same_bits(got.label, want.label)
    assert_same_bits(got.score, want.score)


def test_columns_sum_to_one_and_unmerge_is_an_indicator():
    x = torch.randn(120, 30, generator=torch.Generator().manual_seed(5))
    got = zip_match(torch.corrcoef(x))
    assert got.merge.shape == got.unmerge.shape == (120, 60)
    torch.testing.assert_close(got.merge.double().sum(0), torch.ones(60, dtype=torch.float64), atol=3e-7, rtol=0)
    assert torch.equal(got.unmerge.sum(1), torch.ones(120))
    assert torch.equal(got.merge > 0, got.unmerge > 0)


def test_groups_stay_together():
    g = torch.Generator().manual_seed(1)
    a = torch.randn(12, 200, generator=g)
    order = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7])  # b's groups are a's, rotated
    b = a[order] + 0.01 * torch.randn(12, 200, generator=g)
    got = zip_match(torch.corrcoef(torch.cat([a, b])), groups=3)
    assert torch.equal(got.label[12:], got.label[:12][order])
    assert got.label[:12].tolist() == list(range(12))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads, monkeypatch):
    monkeypatch.setattr(_native, "threads", lambda: threads)
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(2))
    s = torch.corrcoef(x)
    assert_same_bits(zip_match(s, backend="cpu").label, zip_match(s, backend="reference").label)


@pytest.mark.parametrize(
    ("s", "kwargs", "match"),
    [
        (torch.zeros(3, 3), {}, r"\[2n, 2n\]"),
        (torch.zeros(4, 6), {}, r"\[2n, 2n\]"),
        (torch.full((4, 4), float("nan")), {}, "NaN"),
        (torch.zeros(4, 4), {"ratio": 0.7}, "ratio"),
        (torch.zeros(4, 4), {"alpha": -1.0}, "alpha"),
        (torch.zeros(12, 12), {"groups": 4}, "4 groups"),
        (torch.zeros(4, 4, dtype=torch.int32), {}, "int32"),
    ],
)
def test_bad_input_is_named(s, kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match):
        zip_match(s, **kwargs)

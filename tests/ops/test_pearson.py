import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge.ops import pearson


def test_backends_agree_with_the_reference():
    assert check_op(pearson, backends=["torch"]) >= 30


def test_against_corrcoef_and_by_hand():
    a, b = torch.randn(5, 90), torch.randn(7, 90)
    want = torch.corrcoef(torch.cat([a, b]).double())[:5, 5:]
    torch.testing.assert_close(pearson(a, b).double(), want, atol=1e-6, rtol=0)
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    y = torch.tensor([[3.0, 2.0, 1.0], [1.0, 0.0, 1.0]])
    torch.testing.assert_close(pearson(x, y), torch.tensor([[-1.0, 0.0], [0.0, 0.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(pearson(x, y, center=False)[1, 0], torch.tensor(30 / (75**0.5 * 14**0.5)))


def test_large_means_do_not_cancel():
    """A one-pass covariance in float32 loses everything here, and may come out negative."""
    a = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)) + 3000.0
    got = pearson(a, a)
    want = torch.corrcoef(a.double())
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)
    assert got.isfinite().all()


def test_bits_do_not_depend_on_threads():
    a, b = torch.randn(130, 9000), torch.randn(70, 9000)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(pearson(a, b))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(found[0], found[1])


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (torch.zeros(3), torch.zeros(3, 1), "matrix"),
        (torch.zeros(3, 2), torch.zeros(3, 4), "2 features"),
        (torch.zeros(3, 2).long(), torch.zeros(3, 2), "int64"),
    ],
)
def test_bad_input_is_named(a, b, match):
    with pytest.raises((ValueError, TypeError), match=match):
        pearson(a, b)

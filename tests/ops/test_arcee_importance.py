import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import arcee_importance


def test_backends_agree_with_the_reference():
    assert check_op(arcee_importance, backends=["cpu"]) >= 30


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base, other = torch.zeros(2, 3), torch.tensor([[1.0, -2.0, 0.0], [-0.0, 4.0, -8.0]])
    divergence = torch.tensor([0.5, 0.25])
    assert arcee_importance(base, other, divergence, backend=backend).tolist() == [[0.5, 1.0, 0.0], [0.0, 1.0, 2.0]]
    piece = arcee_importance(base.flatten()[2:5], other.flatten()[2:5], divergence, row=3, offset=2, backend=backend)
    assert piece.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_pieces_do_not_change_a_bit(threads, monkeypatch):
    g = torch.Generator().manual_seed(1)
    base, other = (torch.randn(1001, 140, generator=g).bfloat16() for _ in range(2))
    divergence = torch.rand(1001, generator=g)
    want = arcee_importance(base, other, divergence, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(arcee_importance(base, other, divergence), want)
    flat = base.flatten(), other.flatten()
    pieces = [
        arcee_importance(*(x[a:b] for x in flat), divergence, row=140, offset=a)
        for a, b in ((0, 77), (77, 90_001), (90_001, 140_140))
    ]
    assert_same_bits(torch.cat(pieces).view_as(want), want)


def test_bad_input_is_named():
    x, d = torch.zeros(4, 3), torch.zeros(4)
    with pytest.raises(ValueError, match="has 3 rows, 4 are needed"):
        arcee_importance(x, x, d[:3])
    with pytest.raises(ValueError, match="5 are needed"):
        arcee_importance(x, x, d, row=3, offset=1)
    with pytest.raises(TypeError, match="divergence has dtype"):
        arcee_importance(x, x, d.double())
    with pytest.raises(ValueError, match="offset -1"):
        arcee_importance(x, x, d, offset=-1)
    with pytest.raises(ValueError, match="row 0"):
        arcee_importance(x, x, d, row=0)
    with pytest.raises(ValueError, match=r"other\[0\] has shape"):
        arcee_importance(x, x[:2], d)

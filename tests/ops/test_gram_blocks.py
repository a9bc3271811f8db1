import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import gram, gram_blocks
from fastmerge.ops.gram_blocks import BLOCK, total


def test_backends_agree_with_the_reference():
    assert check_op(gram_blocks, backends=["cpu"]) >= 40


def test_golden_table():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.5, 2.0])
    assert gram(None, [a, b]).tolist() == [[14.0, 6.0], [6.0, 5.25]]
    assert gram(torch.ones(3), [a, b]).tolist() == [[5.0, 1.5], [1.5, 5.25]]  # deltas [0, 1, 2] and [-2, -.5, 1]
    assert gram(None, [torch.zeros(0)]).tolist() == [[0.0]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_cpu_has_the_references_bits_for_any_threads_and_pieces(threads, monkeypatch):
    g = torch.Generator().manual_seed(3)
    base, *models = (torch.randn(3 * BLOCK + 11, generator=g).bfloat16() for _ in range(4))
    want = gram_blocks(base, models, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(gram_blocks(base, models, backend="cpu"), want)
    cut = 2 * BLOCK
    pieces = [gram_blocks(base[s], [m[s] for m in models]) for s in (slice(0, cut), slice(cut, None))]
    assert_same_bits(total(torch.cat(pieces), 3), gram(base, models))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="empty"):
        gram_blocks(None, [])
    with pytest.raises(ValueError, match=r"models\[1\] has shape"):
        gram_blocks(None, [torch.zeros(2), torch.zeros(3)])

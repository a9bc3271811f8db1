import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import nearswap


def test_backends_agree_with_the_reference():
    assert check_op(nearswap, backends=["cpu"]) >= 20


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base, other = torch.tensor([0.0, 0.0, 4.0, 1.0]), torch.tensor([0.5, 2.0, -4.0, 1.0])
    # distances 0.5, 2, 8, 0: shares 1, 0.25, 0.0625, 1
    assert nearswap(base, other, 0.5, backend=backend).tolist() == [0.5, 0.5, 3.5, 1.0]
    assert nearswap(base, other, -1.0, backend=backend).tolist() == base.tolist()


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_pieces_do_not_change_a_bit(threads, monkeypatch):
    g = torch.Generator().manual_seed(1)
    base, other = (torch.randn(140_003, generator=g).bfloat16() for _ in range(2))
    want = nearswap(base, other, 0.3, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(nearswap(base, other, 0.3, backend="cpu"), want)
    assert_same_bits(torch.cat([nearswap(base[:77], other[:77], 0.3), nearswap(base[77:], other[77:], 0.3)]), want)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"other\[0\] has shape"):
        nearswap(torch.zeros(3), torch.zeros(2), 0.1)
    with pytest.raises(TypeError, match="base has dtype"):
        nearswap(torch.zeros(3, dtype=torch.int8), torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="t nan"):
        nearswap(torch.zeros(3), torch.zeros(3), float("nan"))

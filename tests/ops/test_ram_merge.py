import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import ram_merge


def test_backends_agree_with_the_reference():
    assert check_op(ram_merge, backends=["cpu"]) >= 20


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base = torch.ones(4)
    models = [base + torch.tensor([0.5, 0.5, 0.0, -2.0]), base + torch.tensor([0.0, 1.5, 0.0, 0.25])]
    assert ram_merge(base, models, backend=backend).tolist() == [1.5, 2.0, 1.0, 0.125]
    assert ram_merge(base, models, [3.0, 1.0], 0.375, backend=backend).tolist() == [2.5, 2.0, 1.0, -5.0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_pieces_do_not_change_a_bit(threads, monkeypatch):
    g = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(150_001, generator=g).bfloat16() for _ in range(4))
    want = ram_merge(base, models, [1.0, 1.5, 0.3], 0.2, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(ram_merge(base, models, [1.0, 1.5, 0.3], 0.2, backend="cpu"), want)
    pieces = [ram_merge(base[s], [m[s] for m in models], [1.0, 1.5, 0.3], 0.2) for s in (slice(0, 7), slice(7, None))]
    assert_same_bits(torch.cat(pieces), want)


def test_bad_input_is_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="empty"):
        ram_merge(x, [])
    with pytest.raises(ValueError, match=r"models\[0\] has shape"):
        ram_merge(x, [torch.zeros(2)])
    with pytest.raises(ValueError, match="epsilon -1"):
        ram_merge(x, [x], 1.0, -1.0)
    with pytest.raises(ValueError, match="not finite"):
        ram_merge(x, [x], float("inf"))

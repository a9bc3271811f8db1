import pytest
import torch
from checks import check_op

from fastmerge import _native
from fastmerge.ops import ram_counts


def test_backends_agree_with_the_reference():
    assert check_op(ram_counts, backends=["cpu"]) >= 20


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base = torch.ones(5)
    models = [base + torch.tensor([0.5, 0.5, 0.0, 1e-6, -1.0]), base + torch.tensor([0.0, 1.5, 0.0, 0.25, 1.0])]
    assert ram_counts(base, models, backend=backend).tolist() == [[1, 2], [1, 2]]
    assert ram_counts(base, models, 0.75, backend=backend).tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_count(threads, monkeypatch):
    g = torch.Generator().manual_seed(4)
    base, *models = (torch.randint(0, 3, (200_003,), generator=g).half() for _ in range(4))
    want = ram_counts(base, models, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert torch.equal(ram_counts(base, models, backend="cpu"), want)
    changed = [int((m != base).sum()) for m in models]
    assert want.sum(1).tolist() == changed


def test_bad_input_is_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="empty"):
        ram_counts(x, [])
    with pytest.raises(ValueError, match="epsilon -1"):
        ram_counts(x, [x], -1.0)

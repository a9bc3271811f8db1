import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import sce_variance


def test_backends_agree_with_the_reference():
    assert check_op(sce_variance, backends=["cpu"]) >= 20


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base = torch.tensor([1.0, 1.0, 1.0])
    models = [base + torch.tensor(d) for d in ([3.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.5, 3.0], [1.0, 0.5, 1.0])]
    assert sce_variance(base, models, backend=backend).tolist() == [1.5, 0.0, 1.5]
    assert sce_variance(base, models[:1], backend=backend).tolist() == [0.0, 0.0, 0.0]


def test_equal_models_vary_by_exactly_nothing():
    g = torch.Generator().manual_seed(0)
    base, model = (torch.randn(4096, generator=g) for _ in range(2))
    assert int(sce_variance(base, [model] * 5).count_nonzero()) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_bit(threads, monkeypatch):
    g = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(140_003, generator=g).half() for _ in range(4))
    want = sce_variance(base, models, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(sce_variance(base, models, backend="cpu"), want)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="empty"):
        sce_variance(torch.zeros(3), [])
    with pytest.raises(ValueError, match=r"models\[1\] has shape"):
        sce_variance(torch.zeros(3), [torch.zeros(3), torch.zeros(2)])

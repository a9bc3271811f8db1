import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import line_gram


def test_backends_agree_with_the_reference():
    assert check_op(line_gram, backends=["cpu"]) >= 60


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base = torch.ones(2, 2)
    models = [base + torch.tensor([[1.0, 2.0], [0.0, 3.0]]), base + torch.tensor([[2.0, 0.0], [1.0, -1.0]])]
    assert line_gram(base, models, backend=backend).tolist() == [[5.0, 2.0, 4.0], [9.0, -3.0, 2.0]]
    along = line_gram(base, models, along="columns", backend=backend)
    assert along.tolist() == [[1.0, 2.0, 5.0], [13.0, -3.0, 1.0]]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(700, 201), (2, 70_001), (3, 40_000)], ids=str)
def test_the_cpu_has_the_references_bits_for_any_threads_and_pieces(shape, threads, monkeypatch):
    g = torch.Generator().manual_seed(3)
    base, *models = (torch.randn(shape, generator=g).bfloat16() for _ in range(3))
    monkeypatch.setattr(_native, "threads", lambda: threads)
    for along in ("rows", "columns"):
        want = line_gram(base, models, along=along, backend="reference")
        assert_same_bits(line_gram(base, models, along=along, backend="cpu"), want)
    rows = [line_gram(base[s], [m[s] for m in models]) for s in (slice(0, 1), slice(1, None))]
    assert_same_bits(torch.cat(rows), line_gram(base, models))


def test_bad_input_is_named():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="empty"):
        line_gram(x, [])
    with pytest.raises(ValueError, match="a matrix is needed"):
        line_gram(None, [torch.zeros(3)])
    with pytest.raises(ValueError, match="neither 'rows' nor 'columns'"):
        line_gram(x, [x], along="row")
    with pytest.raises(ValueError, match=r"models\[0\] has shape"):
        line_gram(x, [x.T])

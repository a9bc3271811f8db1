import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import line_merge, weighted_sum


def test_backends_agree_with_the_reference():
    assert check_op(line_merge, backends=["cpu"]) >= 40


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base = torch.ones(2, 2)
    models = [base + torch.tensor([[1.0, 2.0], [0.0, 4.0]]), base + torch.tensor([[2.0, 0.0], [1.0, -1.0]])]
    weight = torch.tensor([[1.0, 0.5], [-1.0, 2.0]])
    assert line_merge(base, models, weight, backend=backend).tolist() == [[0.0, 3.0], [3.0, 1.0]]
    along = line_merge(base, models, weight, along="columns", backend=backend)
    assert along.tolist() == [[0.0, 2.0], [0.0, 1.0]]
    assert line_merge(None, models, weight, backend=backend).tolist() == [[-1.0, 2.0], [4.5, 2.5]]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_threads_and_pieces_do_not_change_a_bit(along, threads, monkeypatch):
    g = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(701, 203, generator=g).bfloat16() for _ in range(3))
    weight = torch.randn(2, 701 if along == "rows" else 203, generator=g, dtype=torch.float64)
    want = line_merge(base, models, weight, along=along, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(line_merge(base, models, weight, along=along), want)
    pieces = [
        line_merge(base[s], [m[s] for m in models], weight[:, s] if along == "rows" else weight, along=along)
        for s in (slice(0, 5), slice(5, 600), slice(600, None))
    ]
    assert_same_bits(torch.cat(pieces), want)
    assert_same_bits(line_merge(base, models, weight, along=along, out=base), want)


def test_equal_weights_are_a_weighted_sum():
    g = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(2100, 1001, generator=g) for _ in range(3))  # past the cache
    weight = torch.tensor([[0.3], [0.7]], dtype=torch.float64).expand(2, 2100)
    assert_same_bits(line_merge(base, models, weight), weighted_sum(base, models, [0.3, 0.7]))


def test_bad_input_is_named():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"weight has shape \(1, 2\), expected \(1, 3\)"):
        line_merge(x, [x], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="a matrix is needed"):
        line_merge(None, [x[0]], torch.zeros(1, 2))
    with pytest.raises(ValueError, match="out has shape"):
        line_merge(x, [x], torch.zeros(1, 3), out=torch.zeros(2))

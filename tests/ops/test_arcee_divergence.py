import math

import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import arcee_divergence


def test_backends_agree_with_the_reference():
    assert check_op(arcee_divergence, backends=["cpu"]) >= 30


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base = torch.zeros(3, 2, dtype=torch.float64)
    other = torch.tensor([[math.log(3.0), 0.0], [5.0, 5.0], [0.0, 200.0]], dtype=torch.float64)
    # (3/4, 1/4) and (0, 1) to (1/2, 1/2); adding the same to all changes nothing
    want = [0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.0, math.log(2.0)]
    assert arcee_divergence(base, other, backend=backend).tolist() == pytest.approx(want, rel=1e-6, abs=1e-15)


def test_equal_rows_diverge_by_exactly_nothing():
    x = torch.randn(40, 333, generator=torch.Generator().manual_seed(0)) * 10
    assert int(arcee_divergence(x, x.clone()).count_nonzero()) == 0


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_polynomials_are_as_good_as_the_librarys(scale):
    """Of float64 rows, whose terms' rounding errors of 1e-16 are all that may differ."""
    g = torch.Generator().manual_seed(1)
    base = torch.randn(50, 400, generator=g, dtype=torch.float64) * scale
    other = base + torch.randn(50, 400, generator=g, dtype=torch.float64) * scale
    got, want = arcee_divergence(base, other), arcee_divergence(base, other, backend="reference")
    assert float((got - want).abs().max()) < 1e-14 * max(1.0, float(want.max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 501), (1, 140_003)], ids=str)
def test_threads_and_pieces_do_not_change_a_bit(shape, dtype, monkeypatch):
    g = torch.Generator().manual_seed(2)
    base, other = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    want = arcee_divergence(base, other)
    for threads in (1, 3):
        monkeypatch.setattr(_native, "threads", lambda threads=threads: threads)
        assert_same_bits(arcee_divergence(base, other), want)
    assert_same_bits(
        torch.cat([arcee_divergence(b, o) for b, o in zip(base.split(7), other.split(7), strict=True)]), want
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"other\[0\] has shape"):
        arcee_divergence(torch.zeros(3), torch.zeros(2))
    with pytest.raises(TypeError, match="base has dtype"):
        arcee_divergence(torch.zeros(3, dtype=torch.int32), torch.zeros(3))

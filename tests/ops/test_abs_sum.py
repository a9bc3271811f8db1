import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import abs_sum


def test_backends_agree_with_the_reference():
    assert check_op(abs_sum, backends=["cpu"]) >= 30


def test_golden_values():
    base = torch.tensor([1.0, -2.0, 0.5])
    assert abs_sum(base, [torch.tensor([2.0, 2.0, 0.5]), torch.zeros(3)]).tolist() == [[5.0], [3.5]]
    assert abs_sum(None, [torch.full((65537,), -0.25)]).tolist() == [[16384.0, 0.25]]


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_threads_or_chunks(threads, monkeypatch):
    base, a, b = torch.randn(3, 250_001, generator=torch.Generator().manual_seed(2)).unbind()
    want = abs_sum(base, [a, b], backend="cpu")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    pieces = [slice(i, i + 131072) for i in range(0, 250_001, 131072)]
    assert_same_bits(torch.cat([abs_sum(base[p], [a[p], b[p]], backend="cpu") for p in pieces], 1), want)


@pytest.mark.parametrize(
    ("args", "match"),
    [((None, []), "empty"), ((torch.zeros(2), [torch.zeros(3)]), "shape"), ((None, [torch.zeros(2).int()]), "int32")],
)
def test_bad_input_is_named(args, match):
    with pytest.raises((ValueError, TypeError), match=match):
        abs_sum(*args)

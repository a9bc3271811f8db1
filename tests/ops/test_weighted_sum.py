import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import weighted_sum


def test_backends_agree_with_the_reference():
    assert check_op(weighted_sum, backends=["cpu"]) >= 60


def test_golden_table():
    base = torch.tensor([1.0, 2.0, -4.0])
    a, b = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([1.0, 6.0, -4.0])
    # deltas: a = [1, 0, 4], b = [0, 4, 0]
    assert weighted_sum(base, [a, b], [0.5, 0.25]).tolist() == [1.5, 3.0, -2.0]
    assert weighted_sum(base, [a, b], [0.5, 0.5], scale=2.0).tolist() == [2.0, 6.0, 0.0]
    assert weighted_sum(base, [a, b], [2.0, 2.0], normalize=True).tolist() == [1.5, 4.0, -2.0]
    assert weighted_sum(None, [a, b], [3.0, 1.0], normalize=True).tolist() == [1.75, 3.0, -1.0]
    assert weighted_sum(None, [a, b], 1.0).tolist() == [3.0, 8.0, -4.0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads_or_chunks(threads, monkeypatch):
    g = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(300_001, generator=g) for _ in range(4))
    want = weighted_sum(base, models, [0.1, 0.2, 0.3], backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(weighted_sum(base, models, [0.1, 0.2, 0.3], backend="cpu"), want)
    pieces = [
        weighted_sum(base[i : i + 77_777], [m[i : i + 77_777] for m in models], [0.1, 0.2, 0.3], backend="cpu")
        for i in range(0, 300_001, 77_777)
    ]
    assert_same_bits(torch.cat(pieces), want)


def test_mixed_dtypes_and_out():
    base = torch.randn(1000)
    models = [torch.randn(1000).bfloat16(), torch.randn(1000).half()]
    want = weighted_sum(base, models, 0.5, dtype=torch.bfloat16, backend="reference")
    out = torch.empty(1000, dtype=torch.bfloat16)
    assert weighted_sum(base, models, 0.5, out=out, backend="cpu") is out
    assert_same_bits(out, want)


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((None, [], 1.0), {}, "empty"),
        ((torch.zeros(2), [torch.zeros(3)], 1.0), {}, r"models\[0\] has shape"),
        ((torch.zeros(2), [torch.zeros(2)], [1.0, 2.0]), {}, "2 entries for 1 models"),
        ((None, [torch.zeros(2)], 0.0), {"normalize": True}, "non-zero sum"),
        ((torch.zeros(2, dtype=torch.int32), [torch.zeros(2)], 1.0), {}, "int32"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_input_is_named(args, kwargs, match, backend):
    with pytest.raises((ValueError, TypeError), match=match):
        weighted_sum(*args, backend=backend, **kwargs)

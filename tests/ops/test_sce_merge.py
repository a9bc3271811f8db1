import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import sce_energy, sce_merge, sce_variance, topk_thresholds


def test_backends_agree_with_the_reference():
    assert check_op(sce_merge, backends=["cpu"]) >= 30


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base = torch.tensor([10.0, 0.0, 0.0, 5.0])
    models = [base + torch.tensor([2.0, -1.0, 0.0, 1.0]), base + torch.tensor([1.0, 3.0, 0.0, -3.0])]
    # sums 3, 2, 0, -2: both agree, the second alone, neither (zero), the second alone
    want = torch.tensor([10 + (0.25 * 2 + 0.75 * 1), 3.0, 0.0, 2.0])
    assert torch.equal(sce_merge(base, models, [0.25, 0.75], backend=backend), want)
    (rule,) = topk_thresholds(None, [sce_variance(base, models)], 0.5)  # variances 0.25, 4, 0, 4
    assert torch.equal(
        sce_merge(base, models, [0.25, 0.75], rule, backend=backend), torch.tensor([10.0, 3.0, 0.0, 2.0])
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_pieces_do_not_change_a_bit(threads, monkeypatch):
    g = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(150_001, generator=g).bfloat16() for _ in range(4))
    # few distinct values, so that the rule has ties to split
    models = [base + (8 * m).round() / 8 for m in models]
    (rule,) = topk_thresholds(None, [sce_variance(base, models)], 0.3)
    want = sce_merge(base, models, [0.5, 0.2, 0.3], rule, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(sce_merge(base, models, [0.5, 0.2, 0.3], rule, backend="cpu"), want)
    pieces = [
        sce_merge(base[a:b], [m[a:b] for m in models], [0.5, 0.2, 0.3], rule, offset=a)
        for a, b in ((0, 7), (7, 90_000), (90_000, 150_001))
    ]
    assert_same_bits(torch.cat(pieces), want)


@pytest.mark.parametrize("count", range(1, 10))
def test_any_number_of_models_and_mix_of_dtypes(count):
    """Up to eight stay in registers; ties are split at any place of a vector; the end is no multiple of one."""
    g = torch.Generator().manual_seed(count)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    base = torch.randn(4133, generator=g).half()
    models = [(base + (4 * torch.randn(4133, generator=g)).round() / 8).to(dtypes[k % 3]) for k in range(count)]
    variance = sce_variance(base, models, backend="cpu")
    assert_same_bits(variance, sce_variance(base, models, backend="reference"))
    (rule,) = topk_thresholds(None, [variance], 0.4)
    weight = torch.rand(count, generator=g).tolist()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        want = sce_merge(base, models, weight, rule, dtype=dtype, backend="reference")
        assert_same_bits(sce_merge(base, models, weight, rule, dtype=dtype, backend="cpu"), want)
    energy = [sce_energy(base, models, r, backend=b) for r in (rule, None) for b in ("cpu", "reference")]
    assert_same_bits(energy[0], energy[1])
    assert_same_bits(energy[2], energy[3])


def test_it_may_write_into_an_input():
    g = torch.Generator().manual_seed(2)
    base, *models = (torch.randn(5000, generator=g) for _ in range(3))
    want = sce_merge(base, models, 0.5)
    assert_same_bits(sce_merge(base, models, 0.5, out=base), want)


def test_bad_input_is_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="empty"):
        sce_merge(x, [], 1.0)
    with pytest.raises(ValueError, match=r"models\[0\] has shape"):
        sce_merge(x, [torch.zeros(2)], 1.0)
    with pytest.raises(TypeError, match="base has dtype"):
        sce_merge(torch.zeros(3, dtype=torch.int32), [x], 1.0)
    with pytest.raises(ValueError, match=">= 0"):
        sce_merge(x, [x, x], [0.5, -0.5])
    with pytest.raises(ValueError, match="2 entries for 1 models"):
        sce_merge(x, [x], [0.5, 0.5])
    with pytest.raises(ValueError, match="offset -1"):
        sce_merge(x, [x], 1.0, offset=-1)

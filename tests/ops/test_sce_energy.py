import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import gram_blocks, sce_energy, sce_variance, topk_thresholds
from fastmerge.ops.gram_blocks import BLOCK
from fastmerge.ops.threshold import Threshold


def test_backends_agree_with_the_reference():
    assert check_op(sce_energy, backends=["cpu"]) >= 20


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    base = torch.ones(3)
    models = [base + torch.tensor([2.0, 1.0, 3.0]), base + torch.tensor([0.0, 1.0, -1.0])]
    assert sce_energy(base, models, backend=backend).tolist() == [[14.0, 2.0]]
    assert sce_energy(base, models, Threshold(0, -1), backend=backend).tolist() == [[13.0, 1.0]]  # variances 1, 0, 4


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_cpu_has_the_references_bits_for_any_threads_and_pieces(threads, monkeypatch):
    g = torch.Generator().manual_seed(3)
    base, *models = (torch.randn(2 * BLOCK + 11, generator=g).bfloat16() for _ in range(4))
    (rule,) = topk_thresholds(None, [sce_variance(base, models)], 0.2)
    want = sce_energy(base, models, rule, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(sce_energy(base, models, rule, backend="cpu"), want)
    spans = slice(0, BLOCK), slice(BLOCK, None)
    pieces = [sce_energy(base[s], [m[s] for m in models], rule, offset=s.start) for s in spans]
    assert_same_bits(torch.cat(pieces), want)
    # without a rule: the diagonal of the Gram matrix, in the same order of additions
    assert_same_bits(sce_energy(base, models)[:, 0], gram_blocks(base, models)[:, 0])


def test_bad_input_is_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="empty"):
        sce_energy(x, [])
    with pytest.raises(ValueError, match="offset 5 is not a multiple"):
        sce_energy(x, [x], offset=5)

from __future__ import annotations

import pytest
import torch
from checks import assert_same_bits, check_op
from kernels.triton_guard import memory_guard

from fastmerge import _triton
from fastmerge.ops import weighted_sum

kernel = _triton.kernel("weighted_sum")
many = _triton.kernel("weighted_sum", "weighted_sum_many")


def test_agrees_with_the_reference_bit_for_bit():
    assert check_op(weighted_sum, backends=["triton"]) >= 60


@pytest.mark.parametrize("block", [64, 1024])
@pytest.mark.parametrize("n", [1, 1023, 1024, 3000])
def test_bits_do_not_depend_on_the_block_and_accesses_are_clean(block, n):
    base, *models = torch.randn(4, n).unbind()
    out = torch.full((n,), float("nan"))
    want = weighted_sum(base, models, [0.3, -0.7, 1.1], scale=0.9, normalize=True, backend="reference")
    with memory_guard() as guard:
        kernel(base, models, [0.3, -0.7, 1.1], 0.3 - 0.7 + 1.1, 0.9, out, block=block)
    assert_same_bits(out, want)
    assert guard.bytes_moved() == 5 * 4 * n  # each input once, the result once


def test_traffic_and_sectors():
    n = 40_001
    base, out, *models = torch.zeros(6, n, dtype=torch.bfloat16).unbind()
    base, out, *models = (t.clone() for t in (base, out, *models))
    with memory_guard() as guard:
        kernel(base, models, [0.3] * 4, None, 1.0, out, block=1024)
    assert guard.bytes_moved() <= 1.05 * 6 * 2 * n
    assert guard.full_sector_share() >= 0.95


def test_many_tensors_in_one_launch():
    g = torch.Generator().manual_seed(3)
    jobs, want = [], []
    for n in (1, 0, 70, 513, 64, 200):
        base, *models = torch.randn(4, n, generator=g).bfloat16().unbind()
        base, *models = (t.clone() for t in (base, *models))
        jobs.append((base, models, [0.2, 0.5, 0.4], 1.1, 0.7, torch.full((n,), float("nan"), dtype=torch.bfloat16)))
        want.append(weighted_sum(base, models, [0.2, 0.5, 0.4], normalize=True, scale=0.7, backend="reference"))
    named = [t for base, models, *_, out in jobs for t in (base, *models, out)]
    with memory_guard(*named) as guard:
        got = many(jobs, block=64)
    assert guard.launches == ["weighted_sum_many_kernel"]
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_more_models_than_kernel_arguments():
    g = torch.Generator().manual_seed(4)
    models = [torch.randn(300, generator=g).to([torch.float32, torch.bfloat16][i % 2]) for i in range(21)]
    weights = [0.1 * (i - 7) for i in range(21)]
    for base in (None, torch.randn(300, generator=g)):
        got = weighted_sum(base, models, weights, backend="triton")
        assert_same_bits(got, weighted_sum(base, models, weights, backend="reference"))


def test_traffic_of_many_tensors():
    jobs = []
    for n in (5000, 3000, 9000):
        base, out, *models = (torch.zeros(n, dtype=torch.bfloat16) for _ in range(5))
        jobs.append((base, models, [0.3] * 3, None, 1.0, out))
    named = [t for base, models, *_, out in jobs for t in (base, *models, out)]
    with memory_guard(*named) as guard:
        many(jobs, block=1024)
    assert guard.bytes_moved() <= 1.05 * 5 * 2 * 17_000

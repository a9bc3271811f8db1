from __future__ import annotations

import pytest
import torch
from checks import LAYOUTS, assert_same_bits, clone_tree, compare, map_tensors, poisoned_empty
from kernels.triton_guard import memory_guard

from fastmerge import _triton
from fastmerge._dispatch import use_backend
from fastmerge.ops import consensus_merge, topk_thresholds
from fastmerge.ops._consensus_triton import triton_job

kernel = _triton.kernel("consensus_merge")
many = _triton.kernel("consensus_merge", "consensus_merge_many")
Job = _triton.kernel("consensus_merge", "Job")


@pytest.mark.parametrize("case", consensus_merge.cases, ids=lambda c: c.name)
def test_agrees_with_the_reference_bit_for_bit(case):
    for dtype in case.dtypes:
        args, kwargs = case.make(torch.Generator().manual_seed(1), dtype)
        if consensus_merge.why_not("triton", *args, **kwargs) is not None:
            assert dtype == torch.float64
            assert kwargs["rescale"] == "l1"
            continue
        want = consensus_merge(*args, backend="reference", **kwargs)
        layouts = LAYOUTS if dtype == torch.bfloat16 else ["contiguous"]  # what lies where does not depend on the dtype
        for layout in layouts:
            inputs = map_tensors(clone_tree((args, kwargs)), LAYOUTS[layout])
            with poisoned_empty():
                got = consensus_merge(*inputs[0], backend="triton", **inputs[1])
            compare(got, want, consensus_merge, f"{case.name}, {dtype}, {layout}")


def family(n: int, count: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(n)
    base = torch.randn(n, generator=g) * 0.02
    return base.to(dtype), [(base + torch.randn(n, generator=g) * 0.002).to(dtype) for _ in range(count)]


def job_of(base, models, **options):
    rules = topk_thresholds(base, models, 0.2)
    given = [(r.key, r.index, 2**63 - 1, -1) for r in rules]
    return Job(base=base, models=models, out=torch.full_like(base, float("nan")), weights=[0.5] * len(models),
               coefficients=[0.5] * len(models), trim=1, rules=given, **options)  # fmt: skip


@pytest.mark.parametrize("block", [64, 1024])
def test_accesses_are_clean_and_bits_do_not_depend_on_the_block(block):
    base, models = family(3000, 3)
    job = job_of(base, models, divisor=1.5)
    with memory_guard(base, *models, job.out):
        kernel(job, block=block)
    assert_same_bits(job.out, consensus_merge(base, models, 0.5, 0.2, normalize=True, backend="reference"))


@pytest.mark.parametrize("trim", ["topk", "random"])
def test_traffic_and_sectors(trim):
    base, models = family(60_000, 4)
    job = job_of(base, models)
    if trim == "random":
        job.trim, job.rules, job.limits, job.key = 3, (), [2**30] * 4, (1, 2)
    with memory_guard(base, *models, job.out) as guard:
        kernel(job, block=1024)
    assert guard.bytes_moved("consensus_merge_kernel") <= 1.05 * 6 * 2 * 60_000
    assert guard.full_sector_share() >= 0.95


def test_many_tensors_in_one_launch():
    jobs, want = [], []
    for n in (5, 700, 64, 2):
        base, models = family(n, 3, torch.float32)
        jobs.append(job_of(base, models, divisor=1.5, scale=0.7))
        want.append(consensus_merge(base, models, 0.5, 0.2, normalize=True, scale=0.7, backend="reference"))
    named = [t for j in jobs for t in (j.base, *j.models, j.out)]
    with memory_guard(*named) as guard:
        got = many(jobs, block=64)
    assert guard.launches == ["consensus_merge_kernel"]
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_many_tensors_whose_thresholds_are_found_on_the_device():
    jobs, want = [], []
    for n in (500, 7, 6000):
        base, models = family(n, 2, torch.float32)
        job = job_of(base, models)
        job.rules, job.counts = (), [(max(1, int(0.2 * n)), 0)] * 2
        jobs.append(job)
        want.append(consensus_merge(base, models, 0.5, 0.2, backend="reference"))
    for a, b in zip(many(jobs), want, strict=True):
        assert_same_bits(a, b)


def test_l1_factors_of_many_tensors():
    from fastmerge.ops._consensus_plan import make_plan

    jobs, want = [], []
    options = {"trim": "random", "rescale": "l1", "seed": 3, "gamma": 0.0, "epsilon": 0.0, "elect": "sum",
               "normalize": False, "factors": None, "thresholds": None, "offset": 0}  # fmt: skip
    for n in (500, 9000):
        base, models = family(n, 2)
        plan = make_plan(base, models, 0.5, 0.3, name=str(n), **options)
        jobs.append(triton_job(base, models, torch.empty_like(base), plan, "sum", False, 1.0, 0))
        reference = {"trim": "random", "rescale": "l1", "seed": 3, "name": str(n)}
        want.append(consensus_merge(base, models, 0.5, 0.3, backend="reference", **reference))
    for a, b in zip(many(jobs, block=1024), want, strict=True):
        assert_same_bits(a, b)


def test_whole_call_through_the_context():
    base, models = family(2000, 3)
    with use_backend("triton"):
        got = consensus_merge(base, models, 1.0, 0.2)
    assert_same_bits(got, consensus_merge(base, models, 1.0, 0.2, backend="reference"))

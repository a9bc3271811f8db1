"""highpass_filter of many matrices in shared launches: the bits of each alone, and as many launches as one takes."""

from __future__ import annotations

import sys

import pytest
import torch
from checkpoints import save
from checks import assert_close, assert_same_bits
from fake_device import FakeDevice
from kernels.triton_guard import memory_guard

import fastmerge as fm
from fastmerge import _triton
from fastmerge._dispatch import Batch, batched
from fastmerge.device import use_devices
from fastmerge.ops import highpass_filter
from fastmerge.ops._spectral_mask import spectral_mask
from fastmerge.ops.highpass_filter import fused_merge

alone = _triton.kernel("highpass_filter")
together = _triton.kernel("highpass_filter", "highpass_filter_many")
Job = _triton.kernel("highpass_filter", "Job")
module = sys.modules[alone.__module__]
pruned_module = sys.modules[_triton.kernel("_pruned", "pruned").__module__]
staged_module = sys.modules[_triton.kernel("_staged", "one_tile").__module__]
stages_module = sys.modules[_triton.kernel("_stages", "stages").__module__]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def matrices(seed, shape, count, base=FP32, model=FP32, out=None):
    g = torch.Generator().manual_seed(seed)
    first = (torch.randn(shape, generator=g) * 0.02).to(base)
    models = [(first.double() + torch.randn(shape, generator=g) * 0.002).to(model) for _ in range(count)]
    return first, models, torch.full(shape, float("nan"), dtype=out or base)


def merge_job(seed, shape, cutoff, count, *dtypes):
    base, models, out = matrices(seed, shape, count, *dtypes)
    weights = [0.3 + 0.1 * seed - 0.2 * k for k in range(count)]
    return Job(models, out, spectral_mask(*shape, cutoff, "radial", False), base, weights, True)


def bits_alone(job, which=None):
    return alone(*job._replace(out=torch.full_like(job.out, float("nan"))), which=which)


@pytest.mark.parametrize(
    ("which", "shape", "cutoff", "count", "dtypes"),
    [
        ("pruned", (34, 50), 0.2, 1, (FP32, FP32)),
        ("pruned", (50, 34), 0.4, 3, (BF16, BF16)),
        ("pruned", (300, 8), 0.3, 6, (FP16, FP32, BF16)),
        ("pruned", (136, 200), 0.3, 2, (BF16, BF16)),  # folded
        ("staged", (31, 29), 0.3, 2, (BF16, BF16)),
        ("staged", (40, 48), 0.3, 5, (FP16, FP16)),
        ("staged", (35, 64), 1.2, 1, (FP32, BF16, FP32)),  # the kept part
        ("fft", (33, 48), 0.3, 2, (FP64, FP64)),
        ("fft", (40, 16), 0.6, 3, (BF16, BF16)),
    ],
)
def test_bits_are_those_of_each_alone(which, shape, cutoff, count, dtypes):
    jobs = [merge_job(i, shape, cutoff, count, *dtypes) for i in range(3)]
    jobs[1].models[0][2, 3] = float("nan")
    tensors = [t for j in jobs for t in (j.base, *j.models, j.out)]
    with memory_guard(*tensors) as guard:  # bounds and races
        together(jobs, which=which)
    with memory_guard() as one:
        want = [bits_alone(j, which) for j in jobs[:1]]
    assert guard.launches == one.launches
    want += [bits_alone(j, which) for j in jobs[1:]]
    for i, (job, expected) in enumerate(zip(jobs, want, strict=True)):
        assert bool(job.out.isnan().all()) == (i == 1)
        if i != 1:
            assert job.out.isfinite().all()
            assert_same_bits(job.out, expected, f"matrix {i}")


LAUNCHES = {"pruned": 4, "staged": 3, "fft": 3, "one tile": 1}


@pytest.mark.parametrize("which", LAUNCHES)
def test_twelve_matrices_take_as_many_launches_as_one(which):
    shape = (24, 20) if which == "one tile" else (6, 40)
    form = "staged" if which == "one tile" else which
    counts = []
    for n in (1, 12):
        jobs = [merge_job(i, shape, 0.3, 2, BF16, BF16) for i in range(n)]
        with memory_guard(*(t for j in jobs for t in (j.base, *j.models, j.out))) as guard:
            together(jobs, which=form)
        counts.append(len(guard.launches))
    assert counts == [LAUNCHES[which]] * 2


def test_shapes_masks_and_dtypes_are_groups_of_their_own(monkeypatch):
    jobs = [merge_job(i, (20 + 20 * (i % 2), 30), 0.3, 2, BF16 if i < 4 else FP32) for i in range(7)]
    jobs += [merge_job(7, (40, 30), 0.2, 2, BF16), merge_job(8, (40, 30), 0.3, 1, BF16)]
    sizes = []
    launch_group = module._launch_group
    monkeypatch.setattr(module, "_launch_group", lambda g, w: sizes.append(len(g)) or launch_group(g, w))
    together(jobs)
    assert sizes == [2, 2, 2]  # the single ones need no table
    for job in jobs:
        assert_same_bits(job.out, bits_alone(job))


def test_memory_of_a_launch_is_bounded(monkeypatch):
    jobs = [merge_job(i, (20, 30), 0.3, 2, BF16) for i in range(7)]
    monkeypatch.setattr(module, "TOGETHER", 3 * 600 + 1)
    with memory_guard(*(t for j in jobs for t in (j.base, *j.models, j.out))) as guard:
        together(jobs)
    assert guard.launches == ["one_tile_kernel"] * 3
    for job in jobs:
        assert_same_bits(job.out, bits_alone(job))


@pytest.mark.parametrize("which", ["pruned", "staged", "fft"])
def test_addresses_need_not_be_multiples_of_sixteen(which):
    held = [torch.randn(2 * 35 * 33 + 1) for _ in range(2)]
    mask = spectral_mask(35, 33, 0.3, "disc_min", True)
    jobs = []
    for h in held:
        x, out = h[1:].view(2, 35, 33).unbind()
        jobs.append(Job([x], out.fill_(float("nan")), mask))
    with memory_guard(*held):
        together(jobs, which=which)
    for job in jobs:
        assert_same_bits(job.out, bits_alone(job, which))


@pytest.mark.parametrize("turns", [True, False])
def test_the_thin_panel_by_products_or_by_torch(turns, monkeypatch):
    monkeypatch.setattr(pruned_module, "SMALL", (1 << 20) if turns else 0)
    jobs = [merge_job(i, (48, 90), 0.2, 2, FP32) for i in range(3)]
    with memory_guard(*(t for j in jobs for t in (j.base, *j.models, j.out))) as guard:
        together(jobs, which="pruned")
    assert guard.launches.count("turn_kernel") == (2 if turns else 0)
    for job in jobs:
        assert_same_bits(job.out, bits_alone(job, "pruned"))
        delta = sum(w * (m.double() - job.base.double()) for w, m in zip(job.weights, job.models, strict=True))
        want = job.base.double() + highpass_filter(delta, 0.2, backend="reference")
        assert_close(job.out, want.float(), "fft")


def test_a_list_of_calls():
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randn(36, 40, generator=g).bfloat16() for _ in range(2))
    batch, strided = torch.randn(2, 36, 40, generator=g), torch.empty(40, 36).T
    calls = [
        ((x,), {}), ((y, 0.2), {"dtype": FP32}), ((x,), {"mask": "disc_max", "ring_double": True}), ((batch,), {}),
        ((y.clone(),), {}), ((x, 0.0), {}), ((batch[0],), {"out": strided}), ((x[:0],), {}),
    ]  # fmt: skip
    got = highpass_filter.each([(a, kw | {"backend": "triton"}) for a, kw in calls])
    assert got[6] is strided
    for (args, kwargs), result in zip(calls, got, strict=True):
        assert_same_bits(result, highpass_filter(*args, **(kwargs | {"out": None}), backend="triton"))
    mine = [y.clone() for _ in range(2)]
    highpass_filter.each([((m,), {"out": m, "backend": "triton"}) for m in mine])
    assert_same_bits(mine[1], got[4])


def test_merges_that_wait_go_together(monkeypatch):
    monkeypatch.setenv("FASTMERGE_BACKEND", "triton")
    given = [matrices(i, (36, 40), 2, BF16, BF16) for i in range(4)]
    want = [fused_merge(base, models, [0.5, 0.1 * i]) for i, (base, models, _) in enumerate(given)]
    with memory_guard(*(t for b, m, o in given for t in (b, *m, o))) as guard, batched() as batch:
        with batch.deferring():
            for i, (base, models, out) in enumerate(given):
                assert fused_merge(base, models, [0.5, 0.1 * i], out=out) is out
        assert not guard.launches
    assert guard.launches == ["project_kernel", "turn_kernel", "turn_kernel", "subtract_kernel"]
    for (_, _, out), expected in zip(given, want, strict=True):
        assert_same_bits(out, expected)


def states(count, shapes=((40, 36), (20, 30))):
    g = torch.Generator().manual_seed(9)
    base = {f"layer.{i}.{j}": torch.randn(s, generator=g) * 0.02 for i in range(count) for j, s in enumerate(shapes)}
    tuned = [{n: t + torch.randn(t.shape, generator=g) * 0.002 for n, t in base.items()} for _ in "ab"]
    return [{n: t.bfloat16() for n, t in state.items()} for state in (base, *tuned)]


PARAMETERS = [{"lambda_policy": "constant", "lambda": 0.4}, {"scope": "tensor"}]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=["constant", "weights of each tensor"])
def test_a_merge_in_memory(parameters, launches, monkeypatch):
    monkeypatch.setenv("FASTMERGE_BACKEND", "triton")
    base, *tuned = states(12)
    got = fm.merge("fr", base, tuned, **parameters)
    filters = [n for n in launches if n != "abs_sum_kernel"]
    assert filters == ["project_kernel", "turn_kernel", "turn_kernel", "subtract_kernel", "one_tile_kernel"]
    for name in list(base)[:4]:
        one = fm.merge("fr", {name: base[name]}, [{name: t[name]} for t in tuned], **parameters)
        assert_same_bits(got[name], one[name], name)


@pytest.mark.parametrize(
    "parameters", [*PARAMETERS, {"cutoff": 0.0}], ids=["constant", "weights of each tensor", "kept"]
)
def test_checkpoints_streamed_to_a_gpu(parameters, launches, monkeypatch, tmp_path):
    """Matrices share slots and launches, with the bytes of matrices sent one at a time."""
    every = states(6)
    every[2]["layer.3.0"][1, 2] = float("nan")
    folders = [save(tmp_path / n, state) for n, state in zip("cab", every, strict=True)]
    monkeypatch.setenv("FASTMERGE_BACKEND", "triton")
    count, files = {}, {}
    for small in (0, 1 << 20):
        monkeypatch.setattr(Batch, "SMALL", small)
        launches.clear()
        device = FakeDevice()
        with use_devices([device]):
            fm.merge("fr", folders[0], folders[1:], out=tmp_path / f"{small}", device="cuda", nan="warn", **parameters)
        assert not device.problems
        count[small] = sum(n not in ("abs_sum_kernel", "weighted_sum_kernel") for n in launches)
        files[small] = [f.read_bytes() for f in sorted((tmp_path / f"{small}").glob("*.safetensors"))]
    assert files[0] == files[1 << 20]
    assert files[0]
    assert count == ({0: 0, 1 << 20: 1} if "cutoff" in parameters else {0: 6 * 5, 1 << 20: 5})

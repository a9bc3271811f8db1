from __future__ import annotations

import pytest
import torch
from checks import LAYOUTS, assert_close, map_tensors, poisoned_empty, relative_rms
from kernels.triton_guard import memory_guard

from fastmerge import _triton
from fastmerge.ops import highpass_filter
from fastmerge.ops._spectral_mask import spectral_mask

kernel = _triton.kernel("highpass_filter")
form = _triton.kernel("highpass_filter", "form")


@pytest.mark.parametrize("case", highpass_filter.cases, ids=lambda c: c.name)
def test_agrees_with_the_reference(case):
    for dtype in case.dtypes:
        args, kwargs = case.make(torch.Generator().manual_seed(1), dtype)
        want = highpass_filter(*args, backend="reference", **kwargs)
        for layout in ("contiguous", "strided") if dtype == torch.bfloat16 else ("contiguous",):
            with poisoned_empty():
                got = highpass_filter(*map_tensors(args, LAYOUTS[layout]), backend="triton", **kwargs)
            assert_close(got, want, "fft", f"{case.name}, {dtype}, {layout}")


MASKS = [
    (48, 80, {}), (57, 131, {}), (131, 57, {}), (301, 24, {"cutoff": 0.5}), (20, 222, {"cutoff": 1.2}),
    (128, 128, {"mask": "disc_min"}), (211, 64, {"mask": "disc_min", "ring_double": True}),
    (101, 90, {"mask": "disc_max", "ring_double": True}), (1, 37, {}), (37, 1, {}), (211, 12, {}),
]  # fmt: skip


@pytest.mark.parametrize("which", ["pruned", "fft"])
@pytest.mark.parametrize(("height", "width", "options"), MASKS)
def test_both_forms_are_exact(which, height, width, options):
    x = torch.randn(2, height, width, generator=torch.Generator().manual_seed(2))
    plan = spectral_mask(height, width, options.get("cutoff"), options.get("mask", "radial"), "ring_double" in options)
    out = torch.full_like(x, float("nan"))
    kernel([x], out, plan, which=which)
    want = highpass_filter(x.double(), backend="reference", **options).float()
    assert relative_rms(out, want) < 2e-6 * max(1.0, float(x.square().mean().sqrt() / want.square().mean().sqrt()))


@pytest.mark.parametrize("which", ["pruned", "fft"])
def test_a_whole_merge_is_fused(which):
    g = torch.Generator().manual_seed(3)
    base = (torch.randn(60, 90, generator=g) * 0.02).bfloat16()
    models = [(base.float() + torch.randn(60, 90, generator=g) * 0.002).bfloat16() for _ in range(3)]
    plan = spectral_mask(60, 90, 0.2, "radial", False)
    out = torch.empty(60, 90, dtype=torch.float32)
    with memory_guard(base, *models, out) as guard:
        kernel(models, out, plan, base=base, weights=[0.5, 0.3, 0.4], add_base=True, which=which)
    delta = sum(w * (m.double() - base.double()) for w, m in zip([0.5, 0.3, 0.4], models, strict=True))
    want = base.double() + highpass_filter(delta, 0.2, backend="reference")
    assert_close(out, want.float(), "fft")
    assert len(guard.launches) == (2 if which == "pruned" else 3)


@pytest.mark.parametrize("which", ["pruned", "fft"])
def test_a_nan_or_inf_stays_in_its_matrix(which):
    x = torch.randn(4, 20, 30)
    x[1, 3, 4], x[2, 0, 0] = float("nan"), -float("inf")
    out = torch.empty_like(x)
    kernel([x], out, spectral_mask(20, 30, None, "radial", False), which=which)
    assert out.isnan().all(-1).all(-1).tolist() == [False, True, True, False]
    assert out[[0, 3]].isfinite().all()


def test_the_pruned_form_reads_twice_and_writes_once():
    x = torch.randn(256, 256)
    out = torch.empty_like(x)
    with memory_guard(x, out) as guard:
        kernel([x], out, spectral_mask(256, 256, 0.1, "radial", False), which="pruned")
    assert guard.touched(x) == 2 * x.numel()
    assert guard.touched(out) == x.numel()
    assert guard.full_sector_share(x, out) >= 0.95


def test_out_may_be_the_input():
    x = torch.randn(40, 50)
    want = highpass_filter(x, backend="reference")
    assert highpass_filter(x, out=x, backend="triton") is x
    assert_close(x, want, "fft")


def test_the_form_follows_the_cost_model():
    def name(height, width, cutoff, compute=torch.float32):
        return form(spectral_mask(height, width, cutoff, "radial", False), compute).name

    assert [name(4096, 4096, c) for c in (0.05, 0.1, 0.2)] == ["pruned", "pruned", "fft"]
    assert [name(1024, 1024, c) for c in (0.15, 0.3, 0.9)] == ["pruned", "pruned", "fft"]
    assert name(32000, 1024, 0.15) == name(1024, 32000, 0.15) == "pruned"
    assert name(1024, 1024, 0.1, torch.float64) == "fft"
    assert "the pruned form" in str(highpass_filter.explain(torch.zeros(64, 64)))

from __future__ import annotations

import sys

import pytest
import torch
from checks import LAYOUTS, assert_close, map_tensors, poisoned_empty, relative_rms
from kernels.triton_guard import memory_guard

from fastmerge import _triton
from fastmerge.ops import highpass_filter
from fastmerge.ops._spectral_mask import spectral_mask

kernel = _triton.kernel("highpass_filter")
form = _triton.kernel("highpass_filter", "form")
stages = _triton.kernel("_stages", "stages")
pruned_module = sys.modules[_triton.kernel("_pruned", "pruned").__module__]
kernels = sys.modules[pruned_module.__name__ + "_kernels"]
launch = _triton.kernel("_jit", "launch")


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


FORMS = ["pruned", "staged", "fft"]
STAGED = [
    (24, 32, {}), (31, 29, {}), (32, 32, {"mask": "disc_min", "ring_double": True}), (20, 30, {"cutoff": 1.2}),
    (33, 50, {}), (40, 96, {}), (35, 39, {"cutoff": 0.3}), (51, 24, {"cutoff": 0.5}), (34, 220, {"cutoff": 1.2}),
    (70, 64, {"mask": "disc_min", "ring_double": True}), (35, 90, {"mask": "disc_max", "ring_double": True}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("which", "height", "width", "options"),
    [(w, *m) for w in ("pruned", "fft") for m in MASKS] + [("staged", *m) for m in STAGED],
)
def test_every_form_is_exact(which, height, width, options):
    x = torch.randn(2, height, width, generator=torch.Generator().manual_seed(2))
    plan = spectral_mask(height, width, options.get("cutoff"), options.get("mask", "radial"), "ring_double" in options)
    out = torch.full_like(x, float("nan"))
    kernel([x], out, plan, which=which)
    want = highpass_filter(x.double(), backend="reference", **options).float()
    assert relative_rms(out, want) < 2e-6 * max(1.0, float(x.square().mean().sqrt() / want.square().mean().sqrt()))


def test_a_length_is_two_stages_or_none():
    assert {n: stages(n) for n in (1, 96, 961, 1024, 769, 1331, 2048, 4096)} == {
        1: (1, 1), 96: (6, 16), 961: (31, 31), 1024: (32, 32), 769: None, 1331: None, 2048: None, 4096: None,
    }  # fmt: skip


FOLDED = [
    (128, 128, {"cutoff": 0.7}), (136, 304, {"cutoff": 0.9}), (300, 136, {"cutoff": 1.2}), (128, 264, {"mask": "disc_min"}),
    (264, 264, {"mask": "disc_max", "ring_double": True}),
]  # fmt: skip


@pytest.mark.parametrize("panel", ["products", "torch.fft"])
@pytest.mark.parametrize(("height", "width", "options"), FOLDED)
def test_folded_lines(height, width, options, panel, monkeypatch):
    monkeypatch.setattr(pruned_module, "SMALL", (1 << 20) if panel == "products" else 0)
    monkeypatch.setattr(pruned_module, "TURNS", 1 << 30)
    x = torch.randn(2, height, width, generator=torch.Generator().manual_seed(6))
    x[1, 5, 7] = float("nan")
    out = torch.full_like(x, float("nan"))
    mask = spectral_mask(height, width, options.get("cutoff"), options.get("mask", "radial"), "ring_double" in options)
    with memory_guard(x, out) as guard:
        kernel([x], out, mask, which="pruned")
    middle = ["turn_kernel"] * 2 if panel == "products" else []
    assert guard.launches == ["fold_kernel", "project_kernel", *middle, "subtract_kernel", "unfold_kernel"]
    assert guard.touched(x) == guard.touched(out) == x.numel()  # read once, written once
    if min(height, width) % 64 == 0:  # parts of whole sectors
        assert guard.full_sector_share(x, out) >= 0.95
    want = highpass_filter(x.double(), backend="reference", **options).float()
    assert out[1].isnan().all()
    assert relative_rms(out[0], want[0]) < 2e-6 * max(
        1.0, float(x[0].square().mean().sqrt() / want[0].square().mean().sqrt())
    )


def test_folding_and_unfolding_give_the_lines_back():
    for height, width in ((136, 40), (40, 136)):
        x = torch.randn(2, height, width, generator=torch.Generator().manual_seed(7))
        lines = x if height >= width else x.mT.contiguous()
        m, length = lines.shape[1:]
        folded, back, bad = torch.empty_like(lines), torch.empty_like(x), torch.zeros(2, dtype=torch.int32)
        strides = (width, 1) if height >= width else (1, width)
        grid, tile = (-(-m // 64), 2), {"BM": 64, "BK": 8, "device": x.device}
        flags = {"HAS_BASE": False, "WEIGHTED": False, "table_ptr": None, "ALIGN": 1}
        launch(
            kernels.fold_kernel, grid, x, (x,), (0,), folded, m, length // 8, *strides, x[0].numel(), **tile, **flags
        )
        spectrum = torch.fft.fft(lines.double().view(2, m, 8, length // 8), dim=2)
        want = [spectrum[:, :, 0].real, spectrum[:, :, 4].real]
        want += [getattr(spectrum[:, :, g], part) for g in (1, 2, 3) for part in ("real", "imag")]
        assert (folded.view(2, m, 8, -1) - torch.stack(want, 2)).abs().max() < 2e-6
        launch(kernels.unfold_kernel, grid, folded, x, bad, back, m, length // 8, *strides, x[0].numel(), None, ALIGN=1,
               MODELS=1, ADD_BASE=False, **tile)  # fmt: skip
        assert (back - x).abs().max() < 1e-6


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "ieee"])
def test_products_in_parts(precision, monkeypatch):
    # The interpreter's products are float32 ones whatever is asked for: seen is that the parts make up the whole.
    monkeypatch.setattr(pruned_module, "products", lambda _: precision)
    monkeypatch.setattr(pruned_module, "turns", lambda _: False)  # those are split by Triton itself
    x = torch.randn(70, 40, generator=torch.Generator().manual_seed(8))
    out = torch.empty_like(x)
    kernel([x], out, spectral_mask(70, 40, 0.4, "radial", False), which="pruned")
    error = relative_rms(out, highpass_filter(x.double(), 0.4, backend="reference").float())
    assert (1e-5 < error < 1e-3) if precision == "tf32" else error < 1e-6
    table = torch.randn(1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    high, low = pruned_module.parts_of(table).unbind(1)
    assert (high.view(torch.int32) & 0x1FFF == 0).all()
    assert ((high.double() + low.double() - table).abs() <= table.abs() * 2**-34).all()
    x[3, 4] = float("inf")
    kernel([x], out, spectral_mask(70, 40, 0.4, "radial", False), which="pruned")
    assert out.isnan().all()


LAUNCHES = {"pruned": 4, "staged": 3, "fft": 3, "one tile": 1}


@pytest.mark.parametrize("which", LAUNCHES)
def test_a_whole_merge_is_fused(which):
    g = torch.Generator().manual_seed(3)
    shape = (30, 25) if which == "one tile" else (48, 90)
    base = (torch.randn(shape, generator=g) * 0.02).bfloat16()
    models = [(base.float() + torch.randn(shape, generator=g) * 0.002).bfloat16() for _ in range(3)]
    plan = spectral_mask(*shape, 0.2, "radial", False)
    out = torch.empty(shape, dtype=torch.float32)
    form_name = "staged" if which == "one tile" else which
    with memory_guard(base, *models, out) as guard:
        kernel(models, out, plan, base=base, weights=[0.5, 0.3, 0.4], add_base=True, which=form_name)
    delta = sum(w * (m.double() - base.double()) for w, m in zip([0.5, 0.3, 0.4], models, strict=True))
    want = base.double() + highpass_filter(delta, 0.2, backend="reference")
    assert_close(out, want.float(), "fft")
    assert len(guard.launches) == LAUNCHES[which]


@pytest.mark.parametrize("which", FORMS)
@pytest.mark.parametrize("shape", [(20, 30), (36, 40)])
def test_a_nan_or_inf_stays_in_its_matrix(which, shape):
    x = torch.randn(4, *shape)
    x[1, 3, 4], x[2, 0, 0] = float("nan"), -float("inf")
    out = torch.empty_like(x)
    kernel([x], out, spectral_mask(*shape, None, "radial", False), which=which)
    assert out.isnan().all(-1).all(-1).tolist() == [False, True, True, False]
    assert out[[0, 3]].isfinite().all()


@pytest.mark.parametrize(("width", "panels"), [(256, 1), (260, 2)])  # 2C = 26 and 140, of 128 columns a program
def test_the_pruned_form_reads_twice_and_writes_once(width, panels):
    x = torch.randn(260, width)
    out = torch.empty_like(x)
    with memory_guard(x, out) as guard:
        kernel([x], out, spectral_mask(260, width, 0.1 if panels == 1 else 0.54, "radial", False), which="pruned")
    assert "fold_kernel" not in guard.launches
    assert guard.touched(x) == (panels + 1) * x.numel()
    assert guard.touched(out) == x.numel()
    if width % 8 == 0:
        assert guard.full_sector_share(x, out) >= 0.95


@pytest.mark.parametrize(("cutoff", "reads", "blocks"), [(0.3, 2, 4), (1.0, 1, 10)])
def test_three_round_trips(cutoff, reads, blocks):
    x = torch.randn(64, 256)
    out = torch.empty_like(x)
    plan = spectral_mask(64, 256, cutoff, "radial", False)
    with memory_guard(x, out) as guard:
        kernel([x], out, plan, which="staged")
    assert guard.launches == ["rows_forward_kernel", "columns_kernel", "rows_back_kernel"]
    assert guard.touched(x) == reads * x.numel()
    assert guard.touched(out) == x.numel()
    spectrum = sum(a.addresses.size for a in guard.accesses if a.kernel == "columns_kernel" and a.kind == "store")
    assert spectrum == 64 * 2 * 16 * blocks  # complex elements of the blocks of 16 columns, written once by columns
    stored = [a.addresses for a in guard.accesses if a.kernel == "columns_kernel" and a.kind == "store"]
    low, high = min(int(a.min()) for a in stored), max(int(a.max()) for a in stored)
    spans = [(low, high), *((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (x, out))]
    guard.accesses = [
        a for a in guard.accesses if a.addresses.size and any(b <= int(a.addresses[0]) <= e for b, e in spans)
    ]
    assert guard.bytes_moved() == 4 * (reads + 1) * x.numel() + 4 * 4 * spectrum  # written, read, written, read
    assert guard.full_sector_share() >= 0.95


def test_one_tile_is_one_round_trip():
    x = torch.randn(5, 32, 32)
    out = torch.empty_like(x)
    with memory_guard(x, out) as guard:
        kernel([x], out, spectral_mask(32, 32, 0.5, "radial", False))
    assert guard.launches == ["one_tile_kernel"]
    assert guard.touched(x) == guard.touched(out) == x.numel()


def test_out_may_be_the_input():
    x = torch.randn(40, 50)
    want = highpass_filter(x, backend="reference")
    assert highpass_filter(x, out=x, backend="triton") is x
    assert_close(x, want, "fft")


def test_the_form_follows_the_cost_model():
    def name(height, width, cutoff, compute=torch.float32):
        return form(spectral_mask(height, width, cutoff, "radial", False), compute).name

    assert [name(4096, 4096, c) for c in (0.03, 0.1, 0.2, 0.4, 0.9)] == ["pruned", "pruned", "pruned", "fft", "fft"]
    assert [name(2048, 2048, c) for c in (0.1, 0.3, 0.4)] == ["pruned", "pruned", "fft"]
    assert [name(8192, 8192, c) for c in (0.1, 0.2)] == ["pruned", "fft"]
    assert name(11008, 4096, 0.4) == "pruned"  # 43 is a prime factor of 11008
    assert name(32000, 1024, 0.15) == name(1024, 32000, 0.15) == "pruned"
    assert [name(512, 512, c) for c in (0.15, 0.4, 0.9)] == ["staged"] * 3  # the fewest launches
    assert [name(1000, 769, c) for c in (0.05, 0.9)] == ["pruned", "fft"]  # no stages; no panel of a few bins
    assert name(2053, 2053, 0.9) == "fft"  # a prime: no stages
    assert name(30, 20, 0.1) == "staged"
    assert name(1024, 1024, 0.1, torch.float64) == "fft"
    shown = str(highpass_filter.explain(torch.zeros(64, 64)))
    assert "the pruned form" in shown
    assert all(word in shown for word in ("pruned ", "staged ", "fft "))

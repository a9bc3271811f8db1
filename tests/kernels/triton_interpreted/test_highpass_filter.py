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
one_tile = _triton.kernel("_staged", "one_tile")
stages = _triton.kernel("_stages", "stages")
Stages = _triton.kernel("_stages", "Stages")
stages_module = sys.modules[Stages.__module__]


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


@pytest.mark.parametrize("lanes", [(2, 16), (1, 4)])
@pytest.mark.parametrize(
    ("height", "width", "cutoff"),
    [(3, 1331, 0.1), (2, 2048, 0.05), (60, 9, 0.4), (27, 8, 1.2), (9, 30, 0.5), (56, 9, 0.3), (56, 8, 1.2), (52, 6, 0.5)],
)  # fmt: skip
def test_lengths_of_three_stages(height, width, cutoff, lanes, monkeypatch):
    # For columns a short length stands for a long one: every pair of rows is a program, and the interpreter is slow.
    monkeypatch.setattr(stages_module, "stages", lambda n: short.get(n) or stages(n))
    short = {
        60: Stages(5, 4, 3), 27: Stages(3, 3, 3), 30: Stages(2, 3, 5), 56: Stages(2, 2, 14), 52: Stages(2, 2, 13),
    }  # fmt: skip
    monkeypatch.setattr(sys.modules[one_tile.__module__], "lanes", lambda: lanes)
    monkeypatch.setattr(sys.modules[kernel.__module__], "TILE", 0)
    x = torch.randn(1, height, width, generator=torch.Generator().manual_seed(4))
    x = torch.cat([x, x + float("inf")])
    out = torch.full_like(x, float("nan"))
    with memory_guard(x, out) as guard:
        mask = spectral_mask(height, width, cutoff, "radial", False)
        kernel([x], out, mask, which="staged")
    rows, columns = ("long_" if n in short or n > 1024 else "" for n in (width, height))
    assert guard.launches == [f"{rows}rows_forward_kernel", f"{columns}columns_kernel", f"{rows}rows_back_kernel"]
    want = highpass_filter(x[0].double(), cutoff, backend="reference").float()
    assert relative_rms(out[0], want) < 2e-6 * max(
        1.0, float(x[0].square().mean().sqrt() / want.square().mean().sqrt())
    )
    assert out[1].isnan().all()
    keeps = stages_module.shape(height, width, int(mask.columns[-1])).keep
    assert guard.touched(x) == (1 if keeps else 2) * x.numel()
    assert guard.touched(out) == out.numel()
    if width == 2048:  # the data; tables of roots stay in the L1 cache
        roots = sys.modules[one_tile.__module__].three_tables(stages(2048), x.device)
        low, high = roots.data_ptr(), roots.data_ptr() + roots.nbytes
        guard.accesses = [
            a for a in guard.accesses
            if a.kernel.startswith("long_rows") and a.addresses.size and not low <= int(a.addresses[0]) < high
        ]  # fmt: skip
        assert guard.bytes_moved() > 0
        assert guard.full_sector_share() >= 0.95


@pytest.mark.parametrize("step", [16, 4])
@pytest.mark.parametrize(
    ("height", "cutoff", "window"),
    [(4096, 0.3, (8, 3)), (4096, 0.6, (16, 0)), (4096, 1.2, (16, 0)), (3072, 0.5, (8, 3)), (2048, 0.9, (8, 8)), (1331, 0.3, (8, 2))],
)  # fmt: skip
def test_columns_of_three_stages(height, cutoff, window, step, monkeypatch):
    # The kernel between the rows' kernels alone: their programs are too many for the interpreter.
    width, staged = 4, sys.modules[one_tile.__module__]
    monkeypatch.setattr(staged, "lanes", lambda: (2, step))
    mask = spectral_mask(height, width, cutoff, "radial", False)
    plan = stages_module.shape(height, width, int(mask.columns[-1]))
    assert plan.keep == (cutoff > 1)
    assert stages_module.kept(plan, mask.rows) == window
    pairs, n1 = -(-height // 2), plan.rows.n1
    bins = torch.randn(2, pairs, n1, plan.blocks // 2, 8, generator=torch.Generator().manual_seed(5))
    meta = {"TABLES": mask.bounds.shape[0], "PRECISION": "ieee", "device": bins.device}

    def planes(t):  # complex [2, height, kx]
        t = t.view(2, pairs, n1, -1, 2, 2, 2).permute(0, 1, 4, 3, 5, 2, 6)  # [.., pair, row, (block), k1, (re, im)]
        return torch.view_as_complex(t.reshape(2, 2 * pairs, -1, 2).double())[:, :height]

    kx = torch.arange(plan.blocks * n1)
    share = torch.zeros(height, len(kx), dtype=torch.float64)
    held = kx[kx <= width // 2]
    share[:, held] = (mask.gain() if plan.keep else 1 - mask.gain())[:, held]
    share *= torch.where((kx == 0) | (2 * kx == width), 1, 2) / width
    want = torch.fft.ifft(torch.fft.fft(planes(bins), dim=1) * share, dim=1)

    def error():
        got = bins.clone()
        with memory_guard() as guard:
            staged._columns(plan, got, mask, 2, meta)
        assert guard.touched(got) == 2 * planes(got).numel() * 2  # read once, written once
        if height % 2 == 0:  # in an odd one two steps share sectors
            assert guard.full_sector_share(got) >= 0.95
        return relative_rms(torch.view_as_real(planes(got)).float(), torch.view_as_real(want).float())

    assert error() < 2e-6
    if plan.tall.n3 > 8 and window[0] == 8:
        for low in (window[1] - 1, 8):  # a window that cuts off changed rows, at either end, is seen
            monkeypatch.setattr(staged, "kept", lambda *_, low=low: (8, low))
            assert error() > 1e-3


def test_columns_compute_what_the_gain_leaves():
    def kept(n3, rows, keep=False):
        return stages_module.kept(
            stages_module.Shape(Stages(4, 1), Stages(16, 16, n3), 2, keep), torch.tensor(rows, dtype=torch.int32)
        )

    assert kept(16, [0]) == (8, 1)
    assert kept(16, [0, 255, 256, 16 * 256 - 1]) == (8, 2)
    assert kept(16, [0, 16 * 256 - 7 * 256]) == (8, 1)
    assert kept(16, [0, 16 * 256 - 7 * 256 - 1]) == (16, 0)  # nine values of q2, 0 and 8 ... 15
    assert kept(16, [0, 7 * 256, 8 * 256 - 1]) == (8, 8)
    assert kept(16, [0, 8 * 256]) == (16, 0)  # not around 0
    assert kept(16, [0], keep=True) == (16, 0)
    assert kept(8, range(0, 2048, 5), keep=True) == (8, 8)
    assert stages_module.shape(1694, 100, 3).tall == (11, 11, 14)  # even last, for whole sectors
    assert stages_module.shape(1694, 100, 3).rows == stages(100)


def test_a_length_is_two_or_three_stages_or_none():
    assert {n: stages(n) for n in (1, 96, 1024, 1331, 2560, 4096, 8192, 769, 11008)} == {
        1: (1, 1, 1), 96: (6, 16, 1), 1024: (32, 32, 1), 1331: (11, 11, 11), 2560: (16, 16, 10), 4096: (16, 16, 16),
        8192: None, 769: None, 11008: None,
    }  # fmt: skip


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


@pytest.mark.parametrize(("cutoff", "panels"), [(0.1, 1), (0.6, 2)])  # 2C = 26 and 154, of 128 columns a program
def test_the_pruned_form_reads_twice_and_writes_once(cutoff, panels):
    x = torch.randn(256, 256)
    out = torch.empty_like(x)
    with memory_guard(x, out) as guard:
        kernel([x], out, spectral_mask(256, 256, cutoff, "radial", False), which="pruned")
    assert guard.touched(x) == (panels + 1) * x.numel()
    assert guard.touched(out) == x.numel()
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

    assert [name(4096, 4096, c) for c in (0.03, 0.1, 0.4, 0.9)] == ["pruned", "staged", "staged", "fft"]
    assert name(8192, 8192, 0.2) == "fft"
    assert [name(2048, 2048, c) for c in (0.1, 0.2, 0.4)] == ["pruned", "staged", "fft"]
    assert name(32000, 1024, 0.15) == name(1024, 32000, 0.15) == "pruned"
    assert [name(512, 512, c) for c in (0.15, 0.4, 0.9)] == ["pruned", "staged", "staged"]  # fft: too many launches
    assert name(2053, 2053, 0.5) == "fft"  # a prime: no stages
    assert name(30, 20, 0.1) == "staged"
    assert name(1024, 1024, 0.1, torch.float64) == "fft"
    shown = str(highpass_filter.explain(torch.zeros(64, 64)))
    assert "the pruned form" in shown
    assert all(word in shown for word in ("pruned ", "staged ", "fft "))

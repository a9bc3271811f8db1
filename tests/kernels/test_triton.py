"""The Triton kernels on a machine without a GPU: interpreted against the references, and compiled for real targets.

Both happen in processes of their own (conftest.py starts them): the interpreter has to be chosen before Triton is
imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from kernels import triton_aot
from kernels.occupancy import occupancy, occupancy_gfx942

from fastmerge import _triton
from fastmerge._dispatch import BackendUnavailable, Batch, batched
from fastmerge.ops import highpass_filter, weighted_sum
from fastmerge.ops._spectral_mask import spectral_mask

HERE = Path(__file__).parent
# Kernels bound by memory: occupancy and wide accesses matter. Ranks and chunks that start inside a Philox call are
# reached element by element; elections take four elements a thread, which are 8 bytes of a 16-bit stream.
STREAMING = ("weighted_sum", "random_mask", "topk_row", "collect_kernel",
             "consensus_merge", "l1_norms", "abs_sum", "delta_kernel", "finish_kernel")  # fmt: skip
ELEMENTWISE = ("random_mask, by rank",)
TIMEOUT = 900  # seconds; a hang must end, a loaded machine may be slow


@pytest.fixture(scope="module")
def processes(triton_processes):
    """(folder, finish): finish("aot" | "interpreted") waits and returns (exit code, output)."""
    folder, running = triton_processes

    def finish(name: str) -> tuple[int, str]:
        code = running[name].wait(TIMEOUT)
        return code, (folder / name).read_text()

    return folder, finish


def test_kernels_agree_with_the_references_in_the_interpreter(processes):
    code, output = processes[1]("interpreted")
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed, output
    assert int(passed[1]) >= 120
    assert "skipped" not in output, output


@pytest.fixture(scope="module")
def table(processes):
    folder, finish = processes
    code, output = finish("aot")
    assert code == 0, output
    return json.loads((folder / "table.json").read_text())


def test_no_kernel_got_worse(table):
    committed = json.loads(triton_aot.TABLE.read_text())
    assert table["triton"] == committed["triton"], "another Triton: write the table anew and read the difference"
    assert triton_aot.compare(table, committed) == []


@pytest.mark.parametrize("cutoff", [0.1, 0.5], ids=["pruned", "staged"])
def test_tf32_is_used_only_on_request(cutoff, monkeypatch):
    launcher = _triton.kernel("highpass_filter")
    modules = [sys.modules[launcher.__module__.replace("highpass_filter", n)] for n in ("_pruned", "_staged", "_jit")]
    hopper = types.SimpleNamespace(backend="cuda", arch=90, warp_size=32)
    asked = set()
    for module in modules:
        monkeypatch.setattr(module, "launch", lambda *_, **meta: asked.add(meta["PRECISION"]))
        monkeypatch.setattr(module, "target", lambda: hopper)
    x = torch.zeros(512, 512)
    run = highpass_filter.backends["triton"].run
    for options, precision in (({}, "tf32x3"), ({"tf32": True}, "tf32")):
        asked.clear()
        run(x, cutoff, **options)
        assert asked == {precision}
    assert torch.equal(highpass_filter(x + 1, tf32=True), highpass_filter(x + 1))  # nothing to ask for on a CPU


@pytest.mark.parametrize("target", triton_aot.TARGETS)
def test_resources_of_every_kernel(table, target):
    for name, row in table[target].items():
        kernel = name.rpartition(" / ")[2]
        assert row["spills"] == 0, name
        assert row["occupancy"] > 0, f"{name} asks for {row['shared']} bytes of shared memory"
        assert target in triton_aot.TARGETS
        if kernel.startswith(STREAMING) and not name.startswith(ELEMENTWISE):
            assert row["occupancy"] >= 0.5, (name, row)
            election = name.startswith("consensus_merge bf16") and "without election" not in name
            wide = "wide_stores" if name == "random_mask, the mask alone / random_mask_kernel" else "wide_loads"
            casts = kernel.startswith(("delta_kernel", "finish_kernel"))  # from 16 to 32 bits or back: one side is wide
            also = row["half_loads"] if election else row["wide_stores"] if casts else 0
            assert row[wide] + also > 0, (name, row)
        if "fma" in row and "normalised" not in name:  # a division is made of them, and is IEEE all the same
            assert row["fma"] == 0, f"{name}: class A forbids contraction"


def test_a_worse_row_is_seen():
    row = {"registers": 40, "spills": 0, "shared": 0, "wide_loads": 4, "wide_stores": 1, "occupancy": 0.75}
    assert triton_aot.worse(row, row) == []
    assert triton_aot.worse(row | {"registers": 41, "spills": 2}, row) == ["registers 40 -> 41", "spills 0 -> 2"]
    assert triton_aot.worse(row | {"wide_loads": 3, "occupancy": 0.5}, row) == ["wide_loads 4 -> 3", "occupancy 0.75 -> 0.5"]  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "want"),
    [
        (90, 32, 0, 128, 1.0),  # 65536 / (32 * 32) = 64 warps
        (90, 64, 0, 128, 0.5),
        (120, 40, 0, 128, 1.0),  # 48 warps of 1280 registers fit
        (90, 32, 100 * 1024, 128, 8 / 64),  # two blocks of 101 KiB
        (120, 32, 128 * 1024, 256, 0.0),  # more than a block may have
        (80, 255, 0, 256, 8 / 64),  # one block of 8 warps of 8192 registers
    ],
)
def test_occupancy_rules(arch, registers, shared, threads, want):
    assert occupancy(arch, registers, shared, threads) == want


@pytest.mark.parametrize(
    ("registers", "shared", "waves", "want"),
    [(64, 0, 4, 1.0), (128, 0, 8, 0.5), (128, 40 * 1024, 8, 0.25), (84, 0, 8, 0.5), (8, 65 * 1024, 1, 0.0)],
)
def test_occupancy_rules_of_amd(registers, shared, waves, want):
    assert occupancy_gfx942(registers, shared, waves) == want


def test_the_reason_names_the_remedy_on_a_machine_without_a_gpu():
    x = torch.zeros(3)
    reason = weighted_sum.why_not("triton", x, [x], 1.0)
    assert "TRITON_INTERPRET=1" in reason
    assert "on cpu" in reason
    assert "triton: a tensor is on cpu" in str(weighted_sum.explain(x, [x], 1.0))
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET"):
        weighted_sum(x, [x], 1.0, backend="triton")


def test_a_list_of_calls_and_a_batch_where_no_backend_takes_many():
    x, y = torch.arange(5.0), torch.ones(5)
    calls = [((x, [y], 0.5), {"scale": s}) for s in (1.0, 2.0)]
    want = [weighted_sum(*a, **kw) for a, kw in calls]
    assert all(torch.equal(a, b) for a, b in zip(weighted_sum.each(calls), want, strict=True))
    with batched() as batch, batch.deferring():
        out = torch.full((5,), float("nan"))
        weighted_sum(x, [y], 0.5, out=out)
        assert torch.equal(out, want[0])  # done at once
        assert not batch.waiting


def test_what_waits_in_a_batch_runs_together(monkeypatch):
    ran = []

    def many(calls):
        ran.append(len(calls))
        return [kw["out"].fill_(1) for _, kw in calls]

    cpu = weighted_sum.backends["cpu"]
    monkeypatch.setitem(weighted_sum.backends, "cpu", dataclasses.replace(cpu, many=many))
    monkeypatch.setattr(Batch, "MOST", 3)
    outs = [torch.zeros(4) for _ in range(5)]
    with batched() as batch:
        with batch.deferring():
            for out in outs:
                assert weighted_sum(out, [out], 1.0, out=out) is out
            big = torch.zeros(Batch.SMALL + 1)
            weighted_sum(big, [big], 1.0, out=big)
            assert weighted_sum(outs[0], [outs[0]], 1.0).shape == (4,)  # without out= nothing waits
        assert ran == [3]
    assert ran == [3, 2]
    assert all(bool((out == 1).all()) for out in outs)
    assert not big.any()


def test_the_reason_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    _triton._load.cache_clear()
    try:
        assert "pip install 'fastmerge[triton]'" in _triton.why_not(torch.zeros(1))
    finally:
        _triton._load.cache_clear()


def test_kernel_files_import_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None; import importlib, pkgutil, fastmerge.triton_kernels as t\n"
        "names = [m.name for m in pkgutil.iter_modules(t.__path__)]\n"
        "[importlib.import_module(f'fastmerge.triton_kernels.{n}') for n in names]; print(len(names))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 3


@pytest.mark.parametrize(("height", "width"), [(128256, 4096), (4096, 128256), (1 << 20, 1), (70000, 1024)])
def test_grids_of_tall_matrices_fit(height, width, monkeypatch):
    launcher = _triton.kernel("highpass_filter")
    pruned, jit = (sys.modules[launcher.__module__.replace("highpass_filter", n)] for n in ("_pruned", "_jit"))
    grids = {}
    monkeypatch.setattr(pruned, "launch", lambda kernel, grid, *_, **__: grids.setdefault(kernel.fn.__name__, grid))
    for module in (pruned, jit):
        monkeypatch.setattr(
            module, "target", lambda: types.SimpleNamespace(backend="cuda", arch=90, warp_size=32), raising=False
        )
    x = torch.empty(height, width, dtype=torch.bfloat16, device="meta")  # no memory: nothing is read
    mask = spectral_mask(height, width, 0.02, "radial", False)
    launcher([x, x], x, mask, base=x, weights=[0.5, 0.5], add_base=True, which="pruned")
    assert {"project_kernel", "subtract_kernel"} <= set(grids)
    assert ("fold_kernel" in grids) == (width > 1)
    for name, grid in grids.items():
        assert max(grid[1:]) <= 65535, (name, grid)
        assert math.prod(grid) < 1 << 31
    with pytest.raises(AssertionError, match="more than a GPU's grid takes"):
        jit.launch(None, (1, 65536), device=x.device)

"""The CUDA kernels in the emulator: results under two schedules, traffic, sanitizers, and planted bugs that must be seen."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import assert_close, assert_same_bits, check_op
from kernels.emulated import SANITIZERS, Emulator, build

from fastmerge import _cuda
from fastmerge._dispatch import BackendUnavailable
from fastmerge.ops import _fw_cuda, expert_scatter, fw_lmo, fw_products, fw_step, permute, permute_merge
from fastmerge.ops._permute_cuda import cycle_segments
from fastmerge.ops.fw_products import BLOCK

OPS = {
    op.name: (op, n)
    for op, n in [
        (permute, 120), (permute_merge, 90), (expert_scatter, 60), (fw_products, 42), (fw_lmo, 45), (fw_step, 18)
    ]
}  # fmt: skip


@pytest.fixture
def emulator():
    with _cuda.use_executor(found := Emulator()):
        yield found


@pytest.fixture(scope="module", autouse=True)
def builds():
    """The libraries that the tests load, compiled beside each other."""
    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        list(pool.map(build, SANITIZERS))


@pytest.mark.parametrize("schedule", [0, 2])
@pytest.mark.parametrize("name", OPS)
def test_kernels_agree_with_the_reference(name, schedule, monkeypatch):
    op, expected = OPS[name]
    monkeypatch.setattr(op, "backends", {"cuda": op.backends["cuda"]})
    with _cuda.use_executor(Emulator(schedule=schedule)):
        assert check_op(op) >= expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu_kernels_agree_bit_for_bit_with_the_emulated_ones(emulator, dtype):
    g = torch.Generator().manual_seed(0)
    base, other = (torch.randn(300, 264, generator=g).to(dtype) for _ in range(2))
    perms = {0: torch.randperm(300, generator=g), 1: torch.randperm(264, generator=g)}
    for op, args in ((permute, (other, perms)), (permute_merge, (base, other, perms, 0.3))):
        assert_same_bits(op(*args, backend="cuda"), op(*args, backend="cpu"))
    thetas = [base.float(), base.float()]
    for theta, backend in zip(thetas, ("cuda", "cpu"), strict=True):
        fw_step([theta], [other], 0.37, backend=backend)
    assert_same_bits(*thetas)


@pytest.mark.parametrize("shape", [(300, 256), (300, 129), (5, 300, 128), (300,), (2, 300, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(emulator, shape, dtype):
    axis = shape.index(300)
    g = torch.Generator().manual_seed(0)
    x, p = torch.randn(shape, generator=g).to(dtype), torch.randperm(300, generator=g)
    want = permute(x, {axis: p}, backend="reference")
    assert permute(x, {axis: p}, out=x, backend="cuda") is x
    assert_same_bits(x, want)


def test_in_place_needs_a_segment_of_workspace_only(emulator):
    perm = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).numpy()
    rows, bounds, following = cycle_segments(perm)
    assert sorted(rows) == sorted(i for i in range(1000) if perm[i] != i)
    assert max(np.diff(bounds)) == 32
    assert len(following) <= 1000 / 32 + 20  # one per cycle more, and a random permutation has few cycles
    moved = np.arange(1000)
    for s, after in enumerate(following):
        own = rows[bounds[s] : bounds[s + 1]]
        moved[own] = [*own[1:], rows[bounds[after]]]
    assert moved.tolist() == perm.tolist()


def test_one_launch_serves_a_list_of_tensors(emulator):
    xs = [torch.randn(n, 64) for n in (3, 40, 1, 17)]
    perms = [{0: torch.randperm(len(x))} for x in xs]
    got = permute(xs, perms, backend="cuda", check=False)
    for a, b in zip(got, permute(xs, perms, backend="reference"), strict=True):
        assert_same_bits(a, b)
    assert [kernel for kernel, _, _ in emulator.launches] == ["permute_rows_kernel_16"]
    fw_step(xs, [x.clone() for x in xs], 0.5, backend="cuda")
    assert len(emulator.launches) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_permutation_of_heads_is_one_gather_of_long_runs(emulator, axis, dtype):
    """q_proj [heads·32, model] by rows and o_proj [model, heads·32] by columns: 16-byte moves, no table per element."""
    shape = (256, 48) if axis == 0 else (48, 256)
    x, heads = torch.randn(shape).to(dtype), torch.randperm(8)
    assert_same_bits(
        permute(x, {axis: heads}, backend="cuda", check=False), permute(x, {axis: heads}, backend="reference")
    )
    assert [kernel for kernel, _, _ in emulator.launches] == ["permute_rows_kernel_16"]


@pytest.mark.parametrize("bad", [[0, 1, 1, 3], [0, 1, 2, 4], [0, -1, 2, 3], [0, 1, 2, 2**32 + 3]])
def test_an_index_is_checked_on_the_device(emulator, bad):
    x = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="group 'p7', tensor 'w', axis 0: not a permutation"):
        permute(x, {0: torch.tensor(bad)}, group="p7", names="w", backend="cuda")
    assert [kernel for kernel, _, _ in emulator.launches] == ["check_permutation_kernel"]


@pytest.mark.parametrize("bad", [[1, 1], [2, 1], [-1, 0], [0, 8]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_are_checked_on_the_device_before_anything_changes(emulator, bad, dtype):
    x = torch.zeros(8)
    with pytest.raises(ValueError, match=r"index\[0\]"):
        expert_scatter(x, torch.tensor(bad, dtype=dtype), torch.ones(2), backend="cuda")
    assert not x.any()
    assert [kernel.removesuffix("_i32").removesuffix("_i64") for kernel, _, _ in emulator.launches] == [
        "check_positions_kernel"
    ]


def test_an_expert_is_undone_exactly(emulator):
    x = torch.randn(50, 40).bfloat16()
    before, at = x.clone(), torch.randperm(2000)[:500].sort().values
    saved = expert_scatter(x, at, torch.randn(500), scale=1e4, backend="cuda")
    expert_scatter(x, at, saved, mode="override", backend="cuda")
    assert torch.equal(x.view(torch.int16), before.view(torch.int16))


def test_reasons_are_given(emulator):
    with pytest.raises(BackendUnavailable, match=r"dtypes torch.float32, torch.float32 and torch.bfloat16 differ"):
        permute_merge(torch.zeros(3), torch.zeros(3), {}, dtype=torch.bfloat16, backend="cuda")
    with pytest.raises(BackendUnavailable, match=r"dtype torch\.float64 is not one of float32, bfloat16, float16"):
        fw_products(torch.zeros(3).double(), [torch.zeros(3).double()], backend="cuda")


def test_feeding_in_pieces_and_many_candidates_give_the_same_bits(emulator):
    gen = torch.Generator().manual_seed(0)
    g, *pool = (torch.randn(2 * BLOCK + 321, generator=gen).bfloat16() for _ in range(15))
    whole = fw_products(g, pool, backend="cuda")
    carry = None
    for begin, end in [(0, BLOCK), (BLOCK, g.numel())]:
        carry = fw_products(g[begin:end], [s[begin:end] for s in pool], carry=carry, backend="cuda")
    few = fw_products(g, pool[:3], backend="cuda")
    for got, want, part in zip(carry, whole, few, strict=True):
        assert_same_bits(got, want)
        assert_same_bits(part, want[:3] if want.ndim else want)
    exact = torch.stack([(g.double() * s.double()).sum() for s in pool])
    assert_close(whole.dots, exact, "reduction32")


def test_candidates_of_several_dtypes_give_the_bits_of_each_alone(emulator):
    gen = torch.Generator().manual_seed(0)
    g, *pool = (torch.randn(BLOCK + 5000, generator=gen) for _ in range(6))
    types = [torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.bfloat16]
    pool = [s.to(t) for s, t in zip(pool, types, strict=True)]
    for gradient in (g, g.bfloat16()):
        emulator.launches.clear()
        got = fw_products(gradient, pool, backend="cuda")
        kernels = [kernel for kernel, _, _ in emulator.launches]
        assert (len(kernels), kernels[-1]) == (4, "fw_totals_kernel")  # after all sums
        for k, s in enumerate(pool):
            alone = fw_products(gradient, [s], backend="cuda")
            assert_same_bits(got.dots[k], alone.dots[0])
            assert_same_bits(got.sqnorms[k], alone.sqnorms[0])
        assert_same_bits(got.grad_sqnorm, alone.grad_sqnorm)
        assert_close(got.dots, fw_products(gradient, pool, backend="reference").dots, "reduction32")


@pytest.mark.parametrize("blocks", [1, 1024, 2 * 1024 + 7])
def test_totals_of_many_blocks_are_added_in_index_order(emulator, blocks):
    parts = blocks * BLOCK // _fw_cuda.PART - 3  # the last block has fewer
    sums = _fw_cuda.Sums(launches := _cuda.Launches(torch.device("cpu")))
    totals = torch.tensor([0.1, -7.0, 1e9], dtype=torch.float64)
    want = totals.tolist()
    sums.make(parts * _fw_cuda.PART - 1, [totals.data_ptr(), 0, totals.data_ptr() + 16])
    values = launches.alive[-1]
    values.copy_(torch.randn(3, parts, generator=torch.Generator().manual_seed(0)))
    sums.run()
    for column in (0, 2):
        for block in np.split(values[column].numpy(), range(16, parts, 16)):
            one = block[0]
            for part in block[1:]:
                one += part  # float32
            want[column] += float(one)
    assert totals.tolist() == want


def test_products_of_the_step(emulator):
    gen = torch.Generator().manual_seed(0)
    shapes = [(BLOCK + 5,), (33, 7), ()]
    theta, s, g = ([torch.randn(n, generator=gen) for n in shapes] for _ in range(3))
    mine = [t.clone() for t in theta]
    got = fw_step(mine, [None, *s[1:]], 0.3, gradients=g, backend="cuda")
    want = fw_step(theta, [None, *s[1:]], 0.3, gradients=g, backend="reference")
    assert_close(got, want, "reduction32")
    for a, b in zip(mine, theta, strict=True):
        assert_same_bits(a, b)


class FakeTransfers:
    """Copies happen only when the computation waits for them: a use before that reads NaN."""

    def __init__(self, device, elements):
        self.buffers = [torch.full((elements,), float("nan")) for _ in range(2)]
        self.pending = [None, None]
        self.busy = [False, False]
        self.log = []

    def send(self, slot, piece):
        assert not self.busy[slot], "a buffer is filled again before its use is over"
        assert self.pending[slot] is None
        self.busy[slot] = True
        self.log.append(("send", slot, piece.numel()))
        self.buffers[slot].fill_(float("nan"))
        self.pending[slot] = piece
        return self.buffers[slot][: piece.numel()]

    def ready(self, slot):
        piece = self.pending[slot]
        self.buffers[slot][: piece.numel()] = piece
        self.pending[slot] = None
        self.log.append(("ready", slot, piece.numel()))

    def used(self, slot):
        self.busy[slot] = False
        self.log.append(("used", slot, 0))


@pytest.mark.parametrize("chunk", [BLOCK, 4 * BLOCK])
def test_candidates_stream_from_the_host_through_two_buffers(emulator, chunk):
    gen = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=gen) for n in (2 * BLOCK + 9, 70, 0)]
    pool = [[torch.randn(t.shape, generator=gen) for t in gradients] for _ in range(3)]
    made = []

    def transfers(device, elements):
        made.append(FakeTransfers(device, elements))
        return made[-1]

    zeros = torch.zeros(3, 7, dtype=torch.float64)
    want = _fw_cuda.products(gradients, pool, True, zeros.clone())
    got = _fw_cuda.streamed_products(gradients, pool, True, zeros.clone(), transfers=transfers, chunk=chunk)
    assert_same_bits(got, want)
    (fake,) = made
    assert len(fake.buffers[0]) <= chunk
    events = [kind for kind, _, _ in fake.log]
    assert events[:4] == ["send", "send", "ready", "used"]  # the next copy runs beside the computation
    assert (
        events.count("send") == events.count("ready") == events.count("used") == 3 * (1 + -(-(2 * BLOCK + 9) // chunk))
    )


def test_norms_known_from_an_earlier_call_are_not_computed_again(emulator):
    gen = torch.Generator().manual_seed(0)
    g, *pool = ([torch.randn(n, generator=gen) for n in (300, 70)] for _ in range(4))
    first = fw_lmo(g, pool, metric="cosine", backend="cuda")
    again = fw_lmo([-t for t in g], pool, metric="cosine", sqnorms=first.sqnorms, backend="cuda")
    assert_same_bits(again.score, -first.score)
    assert again.sqnorms is first.sqnorms or torch.equal(again.sqnorms, first.sqnorms)


class RecordedCuda:
    """torch.cuda's streams and events, remembering what was asked of them in which order."""

    def __init__(self, log):
        self.log = log
        names = iter(["copied0", "copied1", "free0", "free1"])

        class Stream:
            def __init__(self, name="copies"):
                self.name = name

            def wait_event(self, event):
                log.append(f"{self.name} waits for {event.name}")

        class Event:
            def __init__(self):
                self.name = next(names)

            def record(self, stream):
                log.append(f"{self.name} after {stream.name}")

            def synchronize(self):
                log.append(f"host waits for {self.name}")

        self.Stream, self.Event = (lambda device: Stream()), Event
        self.current_stream = lambda device: Stream("kernels")
        self.stream = contextlib.nullcontext


def test_pinned_transfers_order_copies_and_kernels(monkeypatch):
    log = []
    empty = torch.empty
    cuda = RecordedCuda(log)
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    lanes = _fw_cuda.PinnedTransfers(torch.device("cpu"), 8)
    assert lanes.send(0, torch.arange(5.0)).tolist() == [0, 1, 2, 3, 4]
    lanes.ready(0)
    lanes.used(0)
    assert log == [
        "host waits for copied0",  # the pinned buffer has left
        "copies waits for free0",  # the device buffer is no longer read
        "copied0 after copies",
        "kernels waits for copied0",
        "free0 after kernels",
    ]


def _aligned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Sector-aligned, as a GPU's allocator gives memory."""
    values = torch.randn(shape).to(dtype)
    buffer = torch.empty(values.numel() * values.element_size() + 64, dtype=torch.uint8)
    at = -buffer.data_ptr() % 32
    return buffer[at : at + values.numel() * values.element_size()].view(dtype).view(shape).copy_(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic_stays_near_the_minimum(emulator, dtype):
    """Bytes moved in whole sectors over each input read once and each output written once, and how full sectors are."""
    size = torch.empty((), dtype=dtype).element_size()
    x, b, out = (_aligned(64, 2048, dtype=dtype) for _ in range(3))
    p, q, heads = torch.randperm(64), torch.randperm(2048), torch.randperm(8)
    g, theta = (_aligned(2 * BLOCK, dtype=torch.float32) for _ in range(2))
    pool = [_aligned(2 * BLOCK, dtype=dtype) for _ in range(8)]
    conv, conv_out = (_aligned(64, 64, 3, 3, dtype=dtype) for _ in range(2))
    n, plain = x.numel() * size, {"check": False, "backend": "cuda"}

    def moved(minimum, run):
        emulator.count(True)
        run()
        t = emulator.traffic()
        emulator.count(False)
        total = t.loaded + t.stored
        return total / minimum, (t.used_loaded + t.used_stored) / total

    streaming = {
        "rows": moved(2 * n, lambda: permute(x, {0: p}, out=out, **plain)),
        "heads": moved(2 * n, lambda: permute(x, {0: heads}, out=out, **plain)),
        "rows merged": moved(3 * n, lambda: permute_merge(b, x, {0: p}, out=out, **plain)),
        "products": moved(g.numel() * (4 + 8 * size), lambda: fw_products(g, pool, backend="cuda")),
        "step": moved(g.numel() * (8 + size), lambda: fw_step([theta], pool[:1], 0.1, backend="cuda")),
    }
    assert all(traffic <= 1.05 and full >= 0.95 for traffic, full in streaming.values()), streaming
    tiled = {
        "columns": moved(2 * n, lambda: permute(x, {1: q}, out=out, **plain)),
        "both": moved(2 * n, lambda: permute(x, {0: p, 1: q}, out=out, **plain)),
        "both merged": moved(3 * n, lambda: permute_merge(b, x, {0: p, 1: q}, out=out, **plain)),
        "convolution": moved(2 * conv.numel() * size, lambda: permute(conv, {0: p, 1: p}, out=conv_out, **plain)),
        "rows in place": moved(2 * n, lambda: permute(x, {0: p}, out=x, **plain)),
    }
    assert all(traffic <= 1.3 and full >= 0.8 for traffic, full in tiled.values()), tiled


PLANTED = [
    ("thread", "reverse_race_kernel", "data race"),
    ("", "reverse_race_kernel", "wrong result"),
    ("address", "copy_overrun_kernel", "heap-buffer-overflow"),
    ("address", "shared_overrun_kernel", "heap-buffer-overflow"),
    ("address", "overflow_kernel", "signed integer overflow"),
    ("", "barrier_skipped_kernel", "deadlock: 128 threads wait"),
    ("", "misaligned_kernel", "misaligned load"),
]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """(exit code, output) by (sanitizer, "cases" or kernel): one process for each sanitizer, which forks."""
    folders = {s: tmp_path_factory.mktemp("sanitized") for s in SANITIZERS}
    names = {s: ["reverse_ok_kernel", *(k for t, k, _ in PLANTED if t == s), *["cases"] * bool(s)] for s in SANITIZERS}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTMERGE")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    }
    compiler = os.environ.get("CXX", "g++")

    def start(sanitizer: str) -> subprocess.Popen[str]:
        preload = {}
        if sanitizer:
            name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
            preload["LD_PRELOAD"] = subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        # ThreadSanitizer wants its fixed addresses free.
        fixed = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
        script = str(Path(__file__).parent / "sanitized.py")
        command = [*fixed, sys.executable, script, sanitizer, str(folders[sanitizer]), *names[sanitizer]]
        return subprocess.Popen(
            command, env=environment | preload, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    running = [start(s) for s in SANITIZERS]
    said = [r.communicate(timeout=600)[0] for r in running]
    assert [r.returncode for r in running] == [0] * len(running), said
    found = {}
    for sanitizer, kernels in names.items():
        for kernel in kernels:
            text, _, code = (folders[sanitizer] / kernel).read_text().rpartition("\n")
            found[sanitizer, kernel] = int(code), text
    return found


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_every_case_is_clean_under(sanitized, sanitizer):
    code, text = sanitized[sanitizer, "cases"]
    assert code == 0, text[-5000:]
    assert int(text.split(" launches")[0].split()[-1]) > 200


@pytest.mark.parametrize(("sanitizer", "kernel", "seen"), PLANTED)
def test_a_planted_bug_is_seen(sanitized, sanitizer, kernel, seen):
    code, text = sanitized[sanitizer, kernel]
    assert code != 0
    assert seen in text, text[-3000:]
    assert "planted.cuh" in text or not sanitizer


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_a_correct_kernel_is_not_accused(sanitized, sanitizer):
    code, text = sanitized[sanitizer, "reverse_ok_kernel"]
    assert code == 0, text[-3000:]


def test_the_traffic_counter_sees_half_empty_sectors():
    emulator = Emulator()
    source, result = (torch.zeros(4096) for _ in range(2))
    task = np.array([source.data_ptr(), result.data_ptr(), 4096], np.uint64)
    tasks, first = torch.from_numpy(task.view(np.uint8)), torch.zeros(1, dtype=torch.int32)
    emulator.count(True)
    emulator.launch("strided_copy_kernel", 1, 0, tasks, first, 1)
    t = emulator.traffic()
    emulator.count(False)
    # The table is read through plain memory there, so these are the copy's 256 loads and stores of one float per sector.
    assert t.used_stored == 256 * 4
    assert t.stored == 256 * 32

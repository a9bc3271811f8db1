"""The benchmark suite: rows, the correctness gate, GPU timing decisions on a pretended device, comparison and page."""

from __future__ import annotations

import io
import json
import re
import time
import weakref
import xml.etree.ElementTree as ET

import pytest
import torch
from fastmerge.benchmarks import compare, gpu, run, schema
from fastmerge.benchmarks.declare import Bench, Variant
from fastmerge.benchmarks.timing import side_by_side
from rich.console import Console
from typer.testing import CliRunner

from fastmerge import cli, ops
from fastmerge._dispatch import op
from fastmerge.errors import BadInput

LIMITS = {"copy": 10e9, "read": 12e9, "triad": 9e9, "gemm": 200e9, "rfft2": 20e9}
ENV = {
    "device": "A <processor> (2 CPUs)", "driver": None, "threads": 2, "fastmerge": "0.1.0", "torch": "2.13.0",
    "triton": None, "cupy": None, "python": "3.11", "system": "Linux", "commit": "abc1234", "date": "2026-01-01T00:00:00Z",
}  # fmt: skip
SMALL = Bench(
    "weighted_sum",
    (
        Variant(
            "2 x fp32 64",
            lambda device: ((torch.zeros(64), [torch.ones(64), torch.ones(64)], [0.5, 0.25]), {}),
            bytes=4 * 4 * 64,
            flops=6 * 64,
        ),
    ),
    {"torch": lambda base, models, weight: base},
    cupy={"cupy.something": lambda *args: None},
)


def made(**changes):
    row = {
        "op": "topk_mask", "variant": "fp32 & more", "backend": "cpu", "timing": "clock", "p20_s": 0.001, "p50_s": 0.002,
        "p80_s": 0.003, "calls": 5, "bytes": 10_000_000, "flops": 1e6, "bytes_per_s": 5e9, "flops_per_s": 5e8,
        "bound": "memory", "of_ceiling": 0.5, "speedup": 3.0, "ceilings": LIMITS, **ENV, **changes,
    }  # fmt: skip
    return schema.Row(**row)


def test_every_backend_has_a_row_or_a_reason():
    rows = {r.backend: r for r in run.measure(SMALL, SMALL.variants[0], torch.device("cpu"), LIMITS, ENV, budget=0.05)}
    assert set(rows) == {"cpu", "reference", "torch", "triton", "cuda", "cupy", "torch.compile", "cupy.something"}
    for name in ("cpu", "reference", "torch"):
        r = rows[name]
        assert r.skipped is None
        assert r.p20_s <= r.p50_s <= r.p80_s
        assert r.calls >= 3
        assert r.bytes_per_s == pytest.approx(1024 / r.p50_s)
        # Copying is measured again beside the calls, in the same rounds.
        assert r.ceilings["copy"] != LIMITS["copy"]
        assert {**r.ceilings, "copy": 0} == {**LIMITS, "copy": 0}
        assert r.of_ceiling == pytest.approx(1024 / r.ceilings["copy"] / r.p50_s)
        assert r.bound == "memory"
    assert rows["reference"].speedup == 1.0
    for name in ("triton", "cuda", "cupy", "torch.compile", "cupy.something"):
        assert rows[name].skipped
        assert rows[name].p50_s is None
    assert "--compile" in rows["torch.compile"].skipped
    assert "on a GPU" in rows["cupy.something"].skipped


def test_the_nearer_ceiling_counts():
    bench = Bench("weighted_sum", (Variant("v", SMALL.variants[0].make, bytes=10, flops=2000),))
    t = run.Times(0.9e-8, 1e-8, 1.1e-8, 3)
    r = run.row(bench, bench.variants[0], "cpu", t, t, LIMITS, ENV)
    assert r.bound == "compute"
    assert r.of_ceiling == pytest.approx(2000 / 200e9 / 1e-8)


def test_an_operator_that_only_reads_is_compared_with_reads():
    bench = Bench("weighted_sum", (Variant("v", SMALL.variants[0].make, bytes=12, flops=0),), ceiling="read")
    t = run.Times(0.9e-8, 1e-8, 1.1e-8, 3)
    assert run.row(bench, bench.variants[0], "cpu", t, t, LIMITS, ENV).of_ceiling == pytest.approx(12 / 12e9 / 1e-8)


def test_sizes_and_backends_can_be_picked(monkeypatch):
    bench = Bench(SMALL.op, (*SMALL.variants, Variant("the other", SMALL.variants[0].make, 1024, quick=False)))
    monkeypatch.setattr(run, "load", lambda _: bench)
    monkeypatch.setattr(run, "ceilings", lambda *_: LIMITS)
    said = io.StringIO()
    picked = {"only": "other", "backends": ["cpu"], "budget": 0.01, "console": Console(file=said, width=120)}
    rows = run.run(["weighted_sum"], **picked)
    assert {r.variant for r in rows} == {"the other"}
    assert [r.backend for r in rows if r.skipped is None] == ["cpu"]
    assert next(r for r in rows if r.backend == "reference").skipped == "left out by --backend"
    assert next(r for r in rows if r.backend == "cpu").speedup is None
    assert "the other" in said.getvalue()


def test_the_gate_names_what_disagrees():
    @op(numerics="A", kind="elementwise")
    def doubled(x):
        return x * 2

    @doubled.case("three", torch.float32)
    def _(g, dtype):
        return (torch.ones(3, dtype=dtype),), {}

    @doubled.backend("cpu", when=lambda x: None)
    def _(x):
        return x * 2 + 1e-6

    assert run.gate(doubled, torch.device("cpu")) == ["doubled [cpu] three, torch.float32"]
    assert run.gate(ops.weighted_sum, torch.device("cpu")) == []


def test_nothing_is_printed_on_red(monkeypatch):
    monkeypatch.setattr(run, "gate", lambda op, device: ["weighted_sum [cpu] planted"])
    monkeypatch.setattr(run, "ceilings", lambda *_: LIMITS)
    monkeypatch.setattr(run, "measure", lambda *_, **__: pytest.fail("timed"))
    said = io.StringIO()
    with pytest.raises(SystemExit, match="1"):
        run.run(["weighted_sum"], console=Console(file=said))
    assert "planted" in said.getvalue()
    assert "GB/s" not in said.getvalue()


def test_unknown_operators_and_absent_devices(monkeypatch):
    with pytest.raises(BadInput, match="no benchmark for nosuch"):
        run.run(["nosuch"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="no CUDA device"):
        run.run(["weighted_sum"], device="cuda")


class Pretended:
    """A device whose calls take `device` seconds and `host` seconds to launch; notes what is asked of it."""

    l2_bytes = 1000

    def __init__(self, device, host, capturable=True):
        self.device, self.host, self.capturable = device, host, capturable
        self.log = []

    def flush(self):
        self.log.append("flush")

    def elapsed(self, call):
        call()
        self.log.append("elapsed")
        return (self.device, self.host) if not getattr(call, "graph", 0) else (self.device * call.graph, 0.0)

    def capture(self, calls):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append(f"capture {len(calls)}")

        def replay():
            for call in calls:
                call()

        replay.graph = len(calls)
        return replay


def test_a_long_kernel_is_timed_by_events_with_a_cold_cache():
    runtime, ran = Pretended(device=1e-3, host=1e-5), []
    plan = gpu.plan(runtime, lambda: ran.append(1), lambda: pytest.fail("no graph is needed"))
    assert (plan.how, plan.per, plan.flush) == ("events", 1, True)
    runtime.log.clear()
    assert plan.once(runtime) == 1e-3
    assert runtime.log == ["flush", "elapsed"]


def test_a_launch_bound_call_becomes_a_graph_over_rotated_inputs():
    runtime, ran = Pretended(device=2e-6, host=8e-6), []
    plan = gpu.plan(runtime, lambda: ran.append("x"), lambda: [lambda i=i: ran.append(i) for i in range(3)])
    assert (plan.how, plan.per, plan.flush) == ("graph", gpu.REPEATS, False)
    ran.clear()
    runtime.log.clear()
    assert plan.once(runtime) == pytest.approx(2e-6)
    assert ran == [i % 3 for i in range(gpu.REPEATS)]
    assert runtime.log == ["elapsed"]


def test_the_inputs_of_a_graph_live_as_long_as_its_plan():
    class Forgetful(Pretended):
        def capture(self, calls):
            return lambda: None

    def rotated():
        inputs = [torch.zeros(3) for _ in range(2)]
        alive.extend(weakref.ref(t) for t in inputs)
        return [lambda t=t: t.add_(1) for t in inputs]

    alive = []
    plan = gpu.plan(Forgetful(device=2e-6, host=8e-6), lambda: None, rotated)
    assert plan.how == "graph"
    assert all(r() is not None for r in alive)
    del plan
    assert [r() for r in alive] == [None, None]


def test_what_can_not_be_captured_or_repeated_keeps_events():
    runtime = Pretended(device=2e-6, host=8e-6, capturable=False)
    assert gpu.plan(runtime, lambda: None, lambda: [lambda: None]).how == "events"
    runtime = Pretended(device=2e-6, host=8e-6)
    assert gpu.plan(runtime, lambda: None, None).how == "events"


def test_copies_of_inputs_exceed_the_cache_twice():
    assert gpu.copies(100, 1000) == 20
    assert gpu.copies(10_000, 1000) == 1
    assert gpu.copies(1, 10**9) == gpu.MAX_COPIES


def test_side_by_side_on_a_device_resets_before_every_call_and_says_how():
    runtime, state = Pretended(device=2e-6, host=8e-6), []
    times = side_by_side(
        {"a": lambda: state.append("call")}, runtime, budget=1e-5, reset=lambda: state.append("reset"),
        rotated={"a": lambda: pytest.fail("a call with a reset is not put in a graph")},
    )  # fmt: skip
    assert times["a"].how == "events"
    assert times["a"].p50 == 2e-6
    # warm-up: one call and three for the plan; then always reset, call
    assert state[-6:] == ["reset", "call"] * 3


def test_a_call_slower_than_the_budget_is_timed_once():
    ran = []
    slow, quick = (lambda: ran.append("slow") or time.sleep(0.05)), (lambda: ran.append("quick"))
    times = side_by_side({"slow": slow, "quick": quick}, budget=0.04)
    assert times["slow"].calls == ran.count("slow") - 1 == 1  # untimed: what is set up once does not count
    assert times["slow"].p50 >= 0.05
    assert 3 <= times["quick"].calls == ran.count("quick") - 2  # untimed, and to choose the number


def test_rows_survive_the_file_and_bad_ones_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    schema.append(file, [made(), made(p50_s=0.004), made(backend="triton", skipped="no GPU", p50_s=None)])
    rows = schema.read(file)
    assert [(r.backend, r.p50_s) for r in rows] == [("cpu", 0.004), ("triton", None)]  # the last of a key counts
    assert all(json.loads(line)["schema_version"] == schema.SCHEMA for line in file.read_text().splitlines())
    with file.open("a") as f:
        f.write('{"op": "x"}\n')
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 4 is not a row"):
        schema.read(file)
    with pytest.raises(BadInput, match="No such file"):
        schema.read(tmp_path / "nosuch.jsonl")


def saved(tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    schema.append(files[0], [made(), made(op="fw_step", p50_s=0.01), made(op="only_a")])
    other = {
        "commit": "def5678",
        "device": "NVIDIA H100",
        "driver": "580.1",
        "ceilings": {**LIMITS, "copy": 3e12, "gemm": 5e13},
    }
    triton = made(op="fw_step", backend="triton", skipped="no <kernel>", p50_s=None, **other)
    schema.append(files[1], [made(p50_s=0.001, **other), made(op="fw_step", p50_s=0.02, **other), triton])
    return files


def test_compare_prints_ratios_and_writes_a_page_that_stands_alone(tmp_path):
    files, html = saved(tmp_path), tmp_path / "page.html"
    said = CliRunner().invoke(
        cli.app, ["bench", "compare", *map(str, files), "--html", str(html)], env={"COLUMNS": "160"}
    )
    assert said.exit_code == 0, said.output
    ratio = {words[1]: words[-2] for line in said.stdout.splitlines() if len(words := line.split()) > 5 and "│" in line}
    assert ratio["topk_mask"] == "2.00"
    assert ratio["fw_step"] == "0.50"
    assert "only_a" not in said.stdout
    text = html.read_text()
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    assert "no &lt;kernel&gt;" in text
    body = ET.fromstring(re.search(r"<body>.*</body>", text, re.DOTALL)[0])  # well-formed, svg included
    figures = body.findall(".//svg")
    assert len(figures) == 2
    assert all(f.get("role") == "img" and f.get("aria-label") for f in figures)
    assert len(body.findall(".//tbody/tr")) == 2


def test_compare_says_what_is_missing(tmp_path):
    files = saved(tmp_path)
    with pytest.raises(BadInput, match="at least two"):
        compare.compare(files[:1], tmp_path / "x.html")
    lonely = tmp_path / "c.jsonl"
    schema.append(lonely, [made(op="another")])
    with pytest.raises(BadInput, match="in common"):
        compare.compare([files[0], lonely], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()

"""Benchmark commands run whole, on models that take no time, and print what they say they print."""

import sys

import pytest
import torch
from fastmerge.benchmarks.merges import in_memory, pipeline, rates
from fastmerge.benchmarks.merges.checkpoints import family
from fastmerge.benchmarks.merges.peers import METHODS

import fastmerge as fm
from fastmerge import Recipe, ops
from fastmerge.io.files import Files


@pytest.fixture
def run(monkeypatch, capsys):
    threads = torch.get_num_threads()

    def call(command, *arguments):
        monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
        command.main()
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    yield call
    torch.set_num_threads(threads)


def test_pipeline(run, tmp_path):
    size = ("--layers", 1, "--hidden", 64, "--vocabulary", 5000, "--rounds", 1, "--no-cold", "--threads", 2)
    _, head, *rows = run(pipeline, tmp_path / "models", *size, "linear", "ties")
    assert head == ["method", "cache", "reads", "read", "GB/s", "compute", "write", "merge", "ratio", "bound"]
    assert [row[:3] for row in rows] == [["linear", "warm", "1"], ["ties", "warm", "2"]]
    for row in rows:
        assert float(row[7]) > 0
        assert row[9] in ("read", "compute", "write")
    assert not list((tmp_path / "models").glob("pipeline-*"))


def test_computing_alone_reads_only_what_stands_for_all(tmp_path, monkeypatch):
    inputs = family(tmp_path, layers=1, hidden=64, vocabulary=5000)
    parameters = METHODS["ties"].parameters
    recipe = Recipe.from_call("ties", str(inputs[0]), [str(m) for m in inputs[1:]], parameters)
    opened = []

    class Watched(Files):
        def __init__(self):
            super().__init__()
            opened.append(self)

    monkeypatch.setattr(pipeline, "Files", Watched)
    pipeline.compute(recipe, inputs, 2)
    (watched,) = opened
    pieces = 5 * min(pipeline.PATTERN, 5000 * 64) * 2
    assert watched.bytes_read == pieces  # the pattern that stands for everything


def test_rates(run):
    lines = run(rates, "linear", "ties", "--shape", 64, 600, "--models", 2, "--rounds", 1)
    assert {"linear", "ties"} <= {line[0] for line in lines if line}


def test_forms_on_a_pretended_device(monkeypatch, capsys):
    from fastmerge.benchmarks import forms

    class Clock:
        def capture(self, calls):
            return lambda: [c() for c in calls]

        def elapsed(self, call):
            call()
            return 2e-5, 0.0

    # One form of a tiny matrix takes the interpreter's place: what is timed, and what its error is.
    def run(models, out, mask, which):
        out.copy_(ops.highpass_filter(models[0], 0.3, backend="reference"))
        if which == "fft":
            out.mul_(1 + 1e-3)

    kernel = forms._triton.kernel
    monkeypatch.setattr(
        forms._triton,
        "kernel",
        lambda op, name=None: (
            run if name is None else {"costs": lambda _: ["staged", "fft"]}.get(name) or kernel(op, name)
        ),
    )
    [(cutoff, took, errors)] = forms.rows(Clock(), torch.device("cpu"), 12, 10, [0.3])
    assert cutoff == 0.3
    assert took == dict.fromkeys(("copy", "torch", "staged", "fft"), pytest.approx(2.0))
    assert errors == {"staged": pytest.approx(0, abs=1e-6), "fft": pytest.approx(1e-3, rel=1e-3)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert forms.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_merges_in_memory(capsys):
    assert in_memory.main(["linear", "ties", "fr", "--layers", "1", "--hidden", "32", "--rounds", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[2:]] == ["linear", "ties", "fr"]
    assert all(float(cell) > 0 for line in lines[2:] for cell in line[1:3])
    base, *models = in_memory.states(1, 32, 3, torch.device("cpu"))
    for method, parameters in (
        ("linear", {"weight": 0.25}),
        ("ties", {"weight": 1, "density": 0.2}),
    ):  # the same merge on both sides
        want = in_memory.plainly(method, base, models, parameters, torch.device("cpu"))
        got = fm.merge(method, None if method == "linear" else base, models, **parameters)
        other = torch.cat([((got[n].float() - want[n].float()).abs() > 1e-3).flatten() for n in base]).float().mean()
        assert other <= (0.03 if method == "ties" else 0), method  # torch.topk takes any of equal bf16 deltas

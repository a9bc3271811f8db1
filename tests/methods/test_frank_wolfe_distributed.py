"""Two gloo processes with parts of every tensor choose and move as one process does."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods.fw_two_processes import FSDP, HARD, SHAPES, SOFT, Quadratic, net_problem, problem

from fastmerge import fw
from fastmerge.errors import BadInput
from fastmerge.gradients import gradient


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("fw_two_processes.py")
    run = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said = run.communicate(timeout=120)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # with the process that it forked
    assert run.returncode == 0, said
    return [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


def alone(name):
    """The run of one process."""
    base, many, target = problem()
    if name in SOFT:
        return fw.frank_wolfe_soft(base, many, Quadratic(target), iterations=2, **SOFT[name])
    return fw.frank_wolfe(base, many, Quadratic(target), iterations=4, **HARD.get(name, {}))


def same(want, found, tolerance=1e-6):
    choices, state, gaps = found
    assert choices == want.choices
    assert gaps == pytest.approx([i.gap for i in want.trace.iterations], rel=100 * tolerance, abs=1e-5 * abs(gaps[0]))
    for n, t in want.state_dict.items():
        torch.testing.assert_close(state[n], t.reshape(-1), rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*HARD, *SOFT])
def test_ranges(found, name):
    (choices, first, gaps), (two, second, others) = (f[f"ranges/{name}"] for f in found)
    assert (choices, gaps) == (two, others)
    joined = {n: first[n] if n == "norm.weight" else torch.cat([first[n], second[n]]) for n in SHAPES}
    assert torch.equal(first["norm.weight"], second["norm.weight"])
    same(alone(name), (choices, joined, gaps))


@pytest.mark.parametrize("name", [*HARD, *SOFT, "partial"])
def test_dtensors(found, name):
    want = alone(name)
    for rank in range(2):
        same(want, found[rank][f"dtensor/{name}"])


@pytest.mark.parametrize("name", list(FSDP))
def test_fsdp_modules(found, name):
    net, base, many, batches = net_problem()
    want = fw.frank_wolfe(base, many, gradient(net, "mse", batches), iterations=4, **FSDP[name])
    for rank in range(2):
        # A search on a loss in float32 finds its step to three digits.
        same(want, found[rank][name], 2e-4 if "search" in name else 1e-5)


def test_bad_input_stops_every_process(found):
    for refused in found:
        assert "shards of 'odd.weight' are [(0, 20), (21, 42)]" in refused["gap in the shards"]
        assert "is a DTensor" in refused["sharded candidate"]
    assert "another process stopped" in found[0]["one process fails"]
    assert "is not finite" in found[1]["one process fails"]


def test_shards_need_a_process_group():
    base, many, _ = problem()
    with pytest.raises(BadInput, match="process group"):
        fw.frank_wolfe(base, many, lambda s: {}, shards={"one.bias": (0, 1)})

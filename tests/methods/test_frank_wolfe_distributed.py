"""Two gloo processes with parts of every tensor choose and move as one process does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from methods.fw_two_processes import HARD, SHAPES, net_problem, problem

from fastmerge import fw
from fastmerge.errors import BadInput
from fastmerge.gradients import gradient


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("fw_two_processes.py")
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [run.communicate(timeout=120)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"found{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [*HARD, "soft"])
def test_ranges(found, name):
    base, many, target = problem()

    def ask(state):
        return {n: state[n] - target[n] for n in SHAPES}

    if name == "soft":
        want = fw.frank_wolfe_soft(base, many, ask, iterations=2, top_k=3, inner_steps=3, inner_lr=0.02)
    else:
        want = fw.frank_wolfe(base, many, ask, iterations=4, **HARD[name])
    (one, first), (two, second) = found[0][f"ranges/{name}"], found[1][f"ranges/{name}"]
    assert one == two == want.choices
    for n in SHAPES:
        got = torch.cat([first[n], second[n]])
        torch.testing.assert_close(got, want.state_dict[n].reshape(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(HARD))
def test_dtensors(found, name):
    base, many, target = problem()
    want = fw.frank_wolfe(base, many, lambda s: {n: s[n] - target[n] for n in SHAPES}, iterations=4, **HARD[name])
    for rank in range(2):
        choices, state = found[rank][f"dtensor/{name}"]
        assert choices == want.choices
        for n in SHAPES:
            torch.testing.assert_close(state[n], want.state_dict[n].reshape(-1), rtol=1e-6, atol=1e-6)


def test_fsdp_modules(found):
    net, base, many, batches = net_problem()
    want = fw.frank_wolfe(base, many, gradient(net, "mse", batches), iterations=4, metric="cosine", step_size=1.0)
    for rank in range(2):
        choices, state = found[rank]["fsdp"]
        assert choices == want.choices
        for n, t in want.state_dict.items():
            torch.testing.assert_close(state[n], t.reshape(-1), rtol=1e-5, atol=1e-6)


def test_shards_need_a_process_group():
    base, many, _ = problem()
    with pytest.raises(BadInput, match="process group"):
        fw.frank_wolfe(base, many, lambda s: {}, shards={"one.bias": (0, 1)})

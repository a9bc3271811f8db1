"""Run by test_frank_wolfe_distributed: python fw_two_processes.py FOLDER, which forks into two processes."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastmerge import fw
from fastmerge.errors import BadInput
from fastmerge.gradients import gradient

SHAPES = {"odd.weight": (7, 6), "one.bias": (1,), "wide.weight": (4, 30), "row.weight": (1, 5), "norm.weight": (9,)}


def problem():
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    many = [{n: t + torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(5)]
    target = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    return base, many, target


HARD = {
    "dot": {},
    "cosine": {"metric": "cosine", "zero_if_ascent": True, "pool_init": True},
    "model": {"metric": "cosine", "granularity": "model"},
    "short": {"step": "short", "lipschitz": 1.0, "init": "base"},
    "robust": {"preset": "robust"},
    "line_search": {"step": "line_search", "init": "base"},
    "backtracking": {"step": "short", "init": "base", "granularity": "model"},
    "constant": {"step": "constant", "step_size": 1.0, "space": "deltas"},
}


class Quadratic:
    """½|θ − target|² of what this process holds; `share` of each tensor's loss, so that the processes' mean is the whole's."""

    def __init__(self, target, share=None):
        self.target, self.share, self.value = target, share or dict.fromkeys(target, 1.0), None

    def loss(self, state):
        local = {n: getattr(state[n] - t, "to_local", lambda n=n, t=t: state[n] - t)() for n, t in self.target.items()}
        return float(sum(self.share[n] * d.double().square().sum() for n, d in local.items())) / 2

    def __call__(self, state):
        self.value = self.loss(state)
        return {n: state[n] - t for n, t in self.target.items()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def net_problem():
    torch.manual_seed(1)
    net = Net()
    g = torch.Generator().manual_seed(2)
    base = {n: t.clone() for n, t in net.state_dict().items()}
    many = [{n: t + 0.3 * torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(4)]
    x = torch.randn(12, 6, generator=g)
    return net, base, many, [(x, x.roll(1, 1))]


FSDP = {
    "fsdp": {"metric": "cosine", "step_size": 1.0},
    "fsdp line_search": {"step": "line_search", "init": "base"},
    "fsdp robust": {"preset": "robust"},
}
SOFT = {
    "soft": {"top_k": 3, "inner_steps": 3, "inner_lr": 0.02},
    "soft robust": {"preset": "robust", "top_k": 3},
}


def gaps(result):
    return [i.gap for i in result.trace.iterations]


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    base, many, target = problem()
    found = {}

    def refusal(base=base, candidates=many, gradient=None, **options):
        try:
            fw.frank_wolfe(base, candidates, gradient or (lambda s: dict(s)), **options)
        except BadInput as error:
            return str(error)

    # Plain ranges of the flattened tensors: cut within rows, one tensor on one process alone, one on both.
    cuts = {"odd.weight": 20, "one.bias": 1, "wide.weight": 50, "row.weight": 2}
    shards = {n: ((0, c) if rank == 0 else (c, base[n].numel())) for n, c in cuts.items()}
    if rank:
        del shards["one.bias"]
    shards["norm.weight"] = (0, 9)
    mine = {n: target[n].reshape(-1)[slice(*shards[n])] for n in shards}
    share = {n: 1.0 if n == "norm.weight" else 2.0 for n in shards}

    class Flat(Quadratic):
        def loss(self, state):
            return super().loss({n: state[n].reshape(-1) for n in shards})

        def __call__(self, state):
            return super().__call__({n: state[n].reshape(-1) for n in shards})

    for name, options in HARD.items():
        got = fw.frank_wolfe(base, many, Flat(mine, share), shards=shards, iterations=4, **options)
        found[f"ranges/{name}"] = (got.choices, {n: t.reshape(-1) for n, t in got.state_dict.items()}, gaps(got))
    for name, options in SOFT.items():
        got = fw.frank_wolfe_soft(base, many, Flat(mine, share), shards=shards, iterations=2, **options)
        found[f"ranges/{name}"] = (got.choices, {n: t.reshape(-1) for n, t in got.state_dict.items()}, gaps(got))
    found["gap in the shards"] = refusal(shards={**shards, "odd.weight": (0, 20) if rank == 0 else (21, 42)})
    found["one process fails"] = refusal(
        shards=shards, gradient=lambda s: {n: s[n].reshape(-1) * (float("nan") if rank else 1.0) for n in shards}
    )

    # DTensors, sharded along the first axis (7 rows over 2 processes, 1 row over 2) or replicated.
    mesh = init_device_mesh("cpu", (2,))
    where = {n: [Replicate()] if n in ("one.bias", "norm.weight") else [Shard(0)] for n in SHAPES}
    spread = {n: distribute_tensor(t, mesh, where[n]) for n, t in base.items()}
    goal = {n: distribute_tensor(t, mesh, where[n]) for n, t in target.items()}
    share = {n: 1.0 if where[n] == [Replicate()] else 2.0 for n in SHAPES}
    for name, options in [*HARD.items(), *SOFT.items()]:
        run = fw.frank_wolfe if name in HARD else fw.frank_wolfe_soft
        got = run(spread, many, Quadratic(goal, share), iterations=4 if name in HARD else 2, **options)
        whole = {n: t.full_tensor().reshape(-1) for n, t in got.state_dict.items()}
        assert all(isinstance(t, DTensor) and t.placements == spread[n].placements for n, t in got.state_dict.items())
        found[f"dtensor/{name}"] = (got.choices, whole, gaps(got))

    # Gradients of replicas may be sums that are still partial.
    def partial(state):
        out = {}
        for n, t in state.items():
            out[n] = t - goal[n]
            if where[n] == [Replicate()]:
                half = out[n].to_local() / 2
                out[n] = DTensor.from_local(half, mesh, [Partial()], run_check=False)
        return out

    got = fw.frank_wolfe(spread, many, partial, iterations=4)
    found["dtensor/partial"] = (
        got.choices,
        {n: t.full_tensor().reshape(-1) for n, t in got.state_dict.items()},
        gaps(got),
    )
    found["sharded candidate"] = refusal(base=spread, candidates=[spread])

    # FSDP2: fm.gradient drives the sharded module.
    net, _, pool, batches = net_problem()
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    before = {n: t.full_tensor().clone() for n, t in net.state_dict().items()}
    # Each process differentiates its half of the data: FSDP averages gradients, the losses are averaged with them.
    halves = [(x[rank::2], y[rank::2]) for x, y in batches]
    for name, options in FSDP.items():
        ask = gradient(net, "mse", batches if name == "fsdp" else halves)
        got = fw.frank_wolfe(net, pool, ask, iterations=4, **options)
        found[name] = (got.choices, {n: t.full_tensor().reshape(-1) for n, t in got.state_dict.items()}, gaps(got))
    after = {n: t.full_tensor() for n, t in net.state_dict().items()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    torch.save(found, Path(folder) / f"found{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    import torch._dynamo  # for DTensors: before the fork, it is imported once

    torch.set_num_threads(1)  # two processes share the machine
    other = os.fork()
    main(int(other == 0), sys.argv[1])
    if other:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))

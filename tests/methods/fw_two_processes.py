"""Run by test_frank_wolfe_distributed in each of two processes: python fw_two_processes.py RANK FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastmerge import fw
from fastmerge.gradients import gradient

SHAPES = {"odd.weight": (7, 6), "one.bias": (1,), "wide.weight": (4, 30)}


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
    "constant": {"step": "constant", "step_size": 1.0, "space": "deltas"},
}


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


def main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    base, many, target = problem()
    found = {}

    # Plain ranges of the flattened tensors: cut within rows, and one tensor on one process alone.
    cuts = {"odd.weight": 20, "one.bias": 1, "wide.weight": 50}
    shards = {
        n: ((0, c) if rank == 0 else (c, base[n].numel())) for n, c in cuts.items() if n != "one.bias" or rank == 0
    }
    mine = {n: target[n].reshape(-1)[slice(*shards.get(n, (0, 0)))] for n in SHAPES}
    for name, options in HARD.items():
        got = fw.frank_wolfe(
            base,
            many,
            lambda s: {n: (s[n].reshape(-1) - mine[n]) for n in shards},
            shards=shards,
            iterations=4,
            **options,
        )
        found[f"ranges/{name}"] = (got.choices, {n: t.reshape(-1) for n, t in got.state_dict.items()})
    soft = fw.frank_wolfe_soft(
        base, many, lambda s: {n: (s[n].reshape(-1) - mine[n]) for n in shards}, shards=shards, iterations=2, top_k=3,
        inner_steps=3, inner_lr=0.02,
    )  # fmt: skip
    found["ranges/soft"] = (soft.choices, {n: t.reshape(-1) for n, t in soft.state_dict.items()})

    # DTensors, sharded along the first axis (7 rows over 2 processes) or replicated.
    mesh = init_device_mesh("cpu", (2,))
    where = {"odd.weight": [Shard(0)], "one.bias": [Replicate()], "wide.weight": [Shard(0)]}
    spread = {n: distribute_tensor(t, mesh, where[n]) for n, t in base.items()}
    goal = {n: distribute_tensor(t, mesh, where[n]) for n, t in target.items()}
    for name, options in HARD.items():
        got = fw.frank_wolfe(spread, many, lambda s: {n: s[n] - goal[n] for n in s}, iterations=4, **options)
        whole = {n: t.full_tensor().reshape(-1) for n, t in got.state_dict.items()}
        assert all(isinstance(t, DTensor) and t.placements == spread[n].placements for n, t in got.state_dict.items())
        found[f"dtensor/{name}"] = (got.choices, whole)

    # FSDP2: fm.gradient drives the sharded module.
    from torch.distributed.fsdp import fully_shard

    net, _, pool, batches = net_problem()
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    ask = gradient(net, "mse", batches)
    before = {n: t.full_tensor().clone() for n, t in net.state_dict().items()}
    got = fw.frank_wolfe(net, pool, ask, iterations=4, metric="cosine", step_size=1.0)
    found["fsdp"] = (got.choices, {n: t.full_tensor().reshape(-1) for n, t in got.state_dict.items()})
    after = {n: t.full_tensor() for n, t in net.state_dict().items()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    torch.save(found, Path(folder) / f"found{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

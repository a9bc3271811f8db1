"""Tensors split over processes: which part of each this process holds, and sums over the processes.

Two layouts: DTensors sharded along their first axis (FSDP2, HSDP), whose parts are found from the placements; or plain
tensors with explicit ranges of the flattened tensor, ``shards={name: (begin, end)}``, which together hold every element
once, or the same range on several processes (replicas). Only the K·L products and the loss travel.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .choice import Part, Products


def _dtensor() -> Any:
    """The class, or () where nothing has imported it: no tensor can be one then, and importing it takes seconds."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


class Layout:
    """Everything in one process."""

    sharded = False

    def local(self, given: Any) -> Any:
        return given

    def shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Full shapes from those of the base as given."""
        return shapes

    def part(self, name: str, shape: tuple[int, ...]) -> Part:
        return Part(shape, 0, torch.Size(shape).numel(), 0)

    def local_shape(self, name: str, part: Part) -> tuple[int, ...]:
        return part.shape

    def wrap(self, name: str, local: Tensor) -> Tensor:
        return local

    def unwrap(self, name: str, tensor: Any) -> Any:
        """This process's part of a gradient."""
        return tensor

    def check(self, parts: Mapping[str, Part]) -> None:
        """Raises BadInput when the processes' parts do not make up the tensors."""

    def average(self, loss: float) -> float:
        """The mean of the processes' losses, the same number on each: they then take the same step."""
        return loss

    def agree(self, failure: BadInput | None) -> None:
        """Raises `failure`, on every process as soon as one has one: nobody waits for a process that has stopped."""
        if failure is not None:
            raise failure

    def counts(self, name: str) -> bool:
        """Whether this process's part enters the sums (a replica does so on one process only)."""
        return True

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        return values

    def reduce_products(self, p: Products, names: list[str]) -> Products:
        """Products over whole tensors, from those over this process's parts; `names` lists every merged tensor."""
        return p


class _Sharded(Layout):
    sharded = True

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise BadInput(
                "sharded tensors need an initialised process group", remedy="call torch.distributed.init_process_group"
            )
        self.group = group
        backend = str(dist.get_backend(group))
        self.device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")

    def reduce(self, values: Tensor) -> Tensor:
        import torch.distributed as dist

        moved = values.to(self.device)
        dist.all_reduce(moved, group=self.group)
        return moved.to(values.device)

    def average(self, loss: float) -> float:
        total = self.reduce(torch.tensor([loss, 1.0], dtype=torch.float64, device="cpu"))
        return float(total[0] / total[1])

    def agree(self, failure: BadInput | None) -> None:
        failed = self.reduce(torch.tensor([float(failure is not None)], dtype=torch.float64, device="cpu"))
        if failure is not None:
            raise failure
        if float(failed) > 0:
            raise BadInput("another process stopped on bad input", remedy="its message says what is wrong")

    def reduce_products(self, p: Products, names: list[str]) -> Products:
        k = p.dots.shape[0]
        where = {n: i for i, n in enumerate(names)}
        rows = torch.zeros(2 * k + 3, len(names), dtype=torch.float64, device="cpu")
        for i, name in enumerate(p.names):
            j = where[name]
            rows[-1, j] = 1.0  # this process has a gradient of it
            if not self.counts(name):
                continue
            rows[:k, j] = p.dots[:, i]
            rows[k : 2 * k, j] = p.squares[:, i]
            rows[2 * k, j], rows[2 * k + 1, j] = p.point[i], p.gradient[i]
        rows = self.reduce(rows)
        kept = [j for j in range(len(names)) if rows[-1, j] > 0]
        if not kept:
            raise BadInput("no process has a gradient of a merged tensor", remedy="does the loss depend on them?")
        rows = rows[:, kept]
        return Products([names[j] for j in kept], rows[:k], rows[k : 2 * k], rows[2 * k], rows[2 * k + 1])


class _Ranges(_Sharded):
    def __init__(self, shards: Mapping[str, tuple[int, int]], group: Any) -> None:
        super().__init__(group)
        self.ranges = dict(shards)
        self.first: dict[str, bool] = {}

    def check(self, parts: Mapping[str, Part]) -> None:
        import torch.distributed as dist

        everyone: list[dict[str, tuple[int, int]]] = [{} for _ in range(dist.get_world_size(self.group))]
        dist.all_gather_object(everyone, {n: (p.begin, p.end) for n, p in parts.items()}, group=self.group)
        rank = dist.get_rank(self.group)
        problems = []
        for name, part in parts.items():
            held = [r.get(name, (0, 0)) for r in everyone]
            at, size = 0, torch.Size(part.shape).numel()
            for begin, end in sorted({h for h in held if h[0] < h[1]}):
                if begin != at:
                    break
                at = end
            if at != size:
                problems.append(
                    BadInput(
                        f"the processes' shards of {name!r} are {held}, the flattened tensor has {size} elements",
                        remedy="give each element to one process, or the same range to several (a replica)",
                    )
                )
            self.first[name] = held.index(held[rank]) == rank
        if problems:
            raise BadInput.collect(problems, "shards")

    def counts(self, name: str) -> bool:
        return self.first[name]

    def part(self, name: str, shape: tuple[int, ...]) -> Part:
        size = torch.Size(shape).numel()
        begin, end = self.ranges.get(name, (0, 0))
        if not 0 <= begin <= end <= size:
            raise BadInput(
                f"shards[{name!r}] is ({begin}, {end}), the flattened tensor has {size} elements",
                remedy=f"give (begin, end) with 0 <= begin <= end <= {size}",
            )
        return Part(shape, begin, end, begin)

    def local_shape(self, name: str, part: Part) -> tuple[int, ...]:
        whole = part.end - part.begin == torch.Size(part.shape).numel()
        return part.shape if whole else (part.end - part.begin,)


class _DTensors(_Sharded):
    def __init__(self, base: Mapping[str, Any], group: Any) -> None:
        super().__init__(group)
        from torch.distributed.tensor import Replicate, Shard

        self.like = {n: t for n, t in base.items() if isinstance(t, _dtensor())}
        self.first: dict[str, bool] = {}
        for name, t in self.like.items():
            split = [p for p in t.placements if not isinstance(p, Replicate)]
            # Exactly Shard: subclasses interleave the rows.
            if len(split) > 1 or any(type(p) is not Shard or p.dim != 0 for p in split):
                raise BadInput(
                    f"tensor {name!r} has placements {t.placements}",
                    remedy="shard it along its first axis: t.redistribute(placements=[Shard(0)])",
                )
            coordinate = t.device_mesh.get_coordinate() or []
            self.first[name] = all(
                c == 0 for c, p in zip(coordinate, t.placements, strict=True) if isinstance(p, Replicate)
            )

    def local(self, given: Any) -> Any:
        return {n: t.to_local() if n in self.like else t for n, t in given.items()}

    def shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {n: tuple(self.like[n].shape) if n in self.like else s for n, s in shapes.items()}

    def part(self, name: str, shape: tuple[int, ...]) -> Part:
        size = torch.Size(shape).numel()
        if name not in self.like:
            return Part(shape, 0, size, 0)
        t = self.like[name]
        row = size // shape[0] if shape and shape[0] else 0
        begin = 0
        for axis, placement in enumerate(t.placements):
            if placement.is_shard():
                rank, count = t.device_mesh.get_coordinate()[axis], t.device_mesh.size(axis)
                chunk = -(-shape[0] // count)  # DTensor splits as torch.chunk does
                begin = min(rank * chunk, shape[0]) * row
        return Part(shape, begin, begin + t.to_local().numel(), 0)

    def local_shape(self, name: str, part: Part) -> tuple[int, ...]:
        return tuple(self.like[name].to_local().shape) if name in self.like else part.shape

    def wrap(self, name: str, local: Tensor) -> Tensor:
        if name not in self.like:
            return local
        t = self.like[name]
        wrapped: Tensor = _dtensor().from_local(
            local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride()
        )
        return wrapped

    def unwrap(self, name: str, tensor: Any) -> Any:
        if not isinstance(tensor, _dtensor()):
            return tensor
        like = self.like.get(name)
        if like is not None and (tensor.placements != like.placements or tensor.device_mesh != like.device_mesh):
            tensor = tensor.redistribute(like.device_mesh, like.placements)  # a sum that is still partial, say
        return tensor.to_local()

    def counts(self, name: str) -> bool:
        if name in self.first:
            return self.first[name]
        import torch.distributed as dist

        return dist.get_rank(self.group) == 0


def whole(given: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """`given`, which is to hold whole tensors; raises BadInput for a DTensor."""
    for name, t in given.items():
        if isinstance(t, _dtensor()):
            raise BadInput(
                f"tensor {name!r} is a DTensor",
                where=what,
                remedy="only the base may be sharded: give a path, of which each process reads its part",
            )
    return given


def layout_of(base: Any, shards: Mapping[str, tuple[int, int]] | None, group: Any) -> Layout:
    """The layout the arguments imply."""
    kind = _dtensor()
    if isinstance(base, Mapping) and any(isinstance(t, kind) for t in base.values()):
        if shards is not None:
            raise BadInput("shards= is for plain tensors; DTensors carry their own layout", remedy="leave shards= out")
        return _DTensors(base, group)
    return Layout() if shards is None else _Ranges(shards, group)

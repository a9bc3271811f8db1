"""One call of permute or permute_merge, validated: what their reference and all their backends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _cuda, _native
from ._checks import require_float, require_like, result_like
from ._permutations import Perms, as_lists, native_axes, normalize, require_bijection, where
from ._permute_cuda import add_gather, permute_in_place, require_bijections

Tensors = Tensor | Sequence[Tensor]
STREAM_BYTES = 8 << 20  # results of a call; fewer are likely to be read again while still in the cache


class Task(NamedTuple):
    """One tensor of a call: `source` is gathered, and averaged with `base` where there is one."""

    source: Tensor
    base: Tensor | None
    perms: dict[int, Tensor]
    result: Tensor  # the tensor to fill
    fresh: bool  # result was allocated by us
    name: str

    @property
    def in_place(self) -> bool:
        return (
            self.base is None
            and self.result.data_ptr() == self.source.data_ptr()
            and self.result.stride() == self.source.stride()
        )


def flat(*values: Tensors | None) -> list[Tensor]:
    """All tensors of some arguments."""
    return [t for v in values if v is not None for t in ([v] if isinstance(v, Tensor) else v)]


def prepare(
    op: str, source: Tensors, base: Tensors | None, perms: Perms | Sequence[Perms], *, dtype: torch.dtype | None = None,
    out: Tensors | None = None, group: str = "", names: str | Sequence[str] = "",
) -> list[Task]:  # fmt: skip
    """Every tensor of a call with its permutations (lengths and dtypes checked) and the tensor to fill."""
    merges = base is not None
    (firsts, others, outs), many, labels = as_lists(op, (base if merges else source, source, out), perms, names)
    tasks = []
    for first, other, o, p, name in zip(firsts, others, outs, many, labels, strict=True):
        assert first is not None
        assert other is not None
        require_float(op, **{f"tensor {name!r}" if name else "base" if merges else "x": first})
        if merges:
            require_like(op, first, [other], f"other of {name!r}" if name else "other")
            if o is not None and o.data_ptr() == other.data_ptr() and o.numel():
                raise ValueError(f"{op}: out may be base, but not other: its elements are read in another order")
        found = normalize(op, first.shape, p, group, name)
        result = result_like(op, first, dtype, o)
        tasks.append(Task(other, first if merges else None, found, result, o is None, name))
    return tasks


def check_reference(op: str, tasks: Sequence[Task], group: str) -> None:
    """Raises ValueError unless every index of a call is a permutation."""
    for t in tasks:
        for axis, index in t.perms.items():
            require_bijection(index, where(op, group, t.name, axis))


def check_native(op: str, tasks: Sequence[Task], group: str) -> None:
    """The same in C++, each tensor of indices once."""
    checked: set[int] = set()
    for t in tasks:
        for axis, index in t.perms.items():
            if id(index) in checked:
                continue
            checked.add(id(index))
            dense = index.to(torch.int64).contiguous()
            if _native.lib().check_permutation(dense.data_ptr(), dense.numel()) >= 0:
                require_bijection(index, where(op, group, t.name, axis))


def answer(first: Tensors, tasks: Sequence[Task]) -> Tensor | list[Tensor]:
    """The results of a call, as many as tensors came in."""
    return tasks[0].result if isinstance(first, Tensor) else [t.result for t in tasks]


def run_native(tasks: Sequence[Task], kernel: Callable[..., None]) -> None:
    """kernel(task, dense result, contiguous source, axes, past the caches?) for every task that is not in place."""
    stream = sum(t.result.numel() * t.result.element_size() for t in tasks) >= STREAM_BYTES
    for t in tasks:
        if t.in_place:
            continue
        source = t.source.contiguous()
        result = t.result
        dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
        axes, _alive = native_axes(source.shape, t.perms)
        kernel(t, dense, source, axes, stream)
        if dense is not t.result:
            t.result.copy_(dense)


def run_cuda(op: str, tasks: Sequence[Task], *, weight: float = 0.0, check: bool = True, group: str = "") -> None:
    """All tasks of a call, in one launch per kernel."""
    device = tasks[0].source.device
    if check:
        require_bijections(op, [t.perms for t in tasks], group, [t.name for t in tasks], device)
    launches = _cuda.Launches(device)
    filled: list[tuple[Tensor, Tensor]] = []  # (result, what the kernel fills) where they differ
    for t in tasks:
        if t.in_place:
            dense = t.source.contiguous()
            permute_in_place(dense, t.perms)
        else:
            source, shape = t.source.contiguous(), t.source.shape
            base = None if t.base is None else t.base.contiguous()
            launches.alive += [source] if base is None else [source, base]
            dense = t.result if t.result.is_contiguous() else torch.empty(shape, dtype=t.result.dtype, device=device)
            add_gather(launches, dense, source, shape, t.perms, base, weight)
        if dense is not t.result:
            filled.append((t.result, dense))
    launches.run()
    for result, dense in filled:
        result.copy_(dense)


# name -> (shape, {axis: slices or blocks}): what both operators are tried on
CASES: dict[str, tuple[tuple[int, ...], dict[int, int]]] = {
    "rows of a matrix": ((70, 264), {0: 70}),
    "columns of a matrix, odd size": ((37, 131), {1: 131}),
    "rows and columns": ((129, 96), {0: 129, 1: 96}),
    "rows and columns, several tiles wide": ((67, 547), {0: 67, 1: 547}),
    "convolution, both channel axes": ((24, 17, 3, 3), {0: 24, 1: 17}),
    "heads as blocks, and input columns": ((96, 40), {0: 12, 1: 40}),
    "rank 5, first, middle and last axes": ((3, 4, 5, 2, 7), {0: 3, 2: 5, 4: 7}),
    "bias": ((257,), {0: 257}),
    "no axis, 0-d": ((), {}),
    "empty": ((0, 6), {1: 6}),
}


def case(
    shape: tuple[int, ...], slices: dict[int, int], tensors: int, options: dict[str, Any]
) -> Callable[[torch.Generator, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Random tensors of a shape with random permutations, as the inputs of an operator."""

    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = [torch.randn(shape, generator=g).to(dtype) for _ in range(tensors)]
        return (*values, {a: torch.randperm(n, generator=g) for a, n in slices.items()}), dict(options)

    return make


def group_case(tensors: int) -> Callable[[torch.Generator, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]:
    """Four tensors of one group in one call."""

    def make(g: torch.Generator, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shared, heads = torch.randperm(48, generator=g), torch.randperm(6, generator=g)
        shapes = [(48, 33), (48,), (20, 48), (7, 48, 3)]
        values = [[torch.randn(s, generator=g).to(dtype) for s in shapes] for _ in range(tensors)]
        perms = [{0: shared}, {0: heads}, {1: shared}, {1: shared}]
        return (*values, perms), {"group": "p", "names": ["a", "b", "c", "d"]}

    return make


SPECIAL = [0.0, -0.0, float("inf"), float("nan"), 1e-40, -65504.0]

"""Validated permutations of tensor axes: what permute and permute_merge, and all their backends, start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Perms = Mapping[int, "Tensor | Sequence[int]"]


@dataclass(frozen=True)
class Axis:
    """One dimension of the collapsed view: `size` slices, gathered by `index` (None = in order)."""

    size: int
    index: Tensor | None


def where(op: str, group: str, name: str, axis: int) -> str:
    """The start of an error about an index: operator, permutation group, tensor and axis."""
    parts = [f"group {group!r}" if group else "", f"tensor {name!r}" if name else "", f"axis {axis}"]
    return f"{op}: {', '.join(p for p in parts if p)}"


def require_bijection(index: Tensor, place: str) -> None:
    """Raises ValueError, naming the first bad entry, unless `index` holds each of 0 … n−1 once."""
    flat = index.detach().cpu().to(torch.int64)
    n = flat.numel()
    outside = ((flat < 0) | (flat >= n)).nonzero()
    if outside.numel():
        at = int(outside[0])
        raise ValueError(f"{place}: not a permutation of 0..{n - 1}: entry {at} is {int(flat[at])}")
    order = torch.argsort(flat, stable=True)
    ranked = flat[order]
    twice = (ranked[1:] == ranked[:-1]).nonzero()
    if twice.numel():
        first, second = int(order[int(twice[0])]), int(order[int(twice[0]) + 1])
        raise ValueError(
            f"{place}: not a permutation of 0..{n - 1}: {int(flat[first])} appears at entries {first} and {second}"
        )


def normalize(op: str, shape: Sequence[int], perms: Perms, group: str, name: str) -> dict[int, Tensor]:
    """`perms` with axes in 0 … rank−1 and integer tensors of a length that divides the axis."""
    found: dict[int, Tensor] = {}
    for key, value in perms.items():
        axis = key + len(shape) if key < 0 else key
        place = where(op, group, name, key)
        if not 0 <= axis < len(shape):
            raise ValueError(f"{place}: the tensor has shape {tuple(shape)}")
        if axis in found:
            raise ValueError(f"{place}: the axis is given twice")
        index = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.int64, device="cpu")
        if index.dtype not in (torch.int64, torch.int32) or index.ndim != 1:
            raise TypeError(f"{place}: the index must be a vector of int64 or int32, not {index.ndim}-d {index.dtype}")
        n, size = index.numel(), shape[axis]
        if n != size and (n == 0 or size % n != 0):
            raise ValueError(
                f"{place}: the index has {n} entries for {size} slices; one per slice, or one per block of equal size"
            )
        found[axis] = index
    return found


def collapse(shape: Sequence[int], perms: Mapping[int, Tensor]) -> list[Axis]:
    """The fewest dimensions that express the gather: neighbours that move together become one.

    A block permutation splits its axis in (blocks, block size). The last dimension has index None unless the innermost
    elements themselves are permuted.
    """
    axes: list[Axis] = []
    for axis, size in enumerate(shape):
        index = perms.get(axis)
        pieces = [Axis(size, None)] if index is None else [Axis(index.numel(), index)]
        if index is not None and index.numel() != size:
            pieces.append(Axis(size // index.numel(), None))
        for piece in pieces:
            if piece.index is None and piece.size == 1:
                continue
            if piece.index is None and axes and axes[-1].index is None:
                axes[-1] = Axis(axes[-1].size * piece.size, None)
            else:
                axes.append(piece)
    return axes


def native_axes(shape: Sequence[int], perms: Mapping[int, Tensor]) -> tuple[list[tuple[int, int]], list[Tensor]]:
    """The collapsed view as (size, address of an int64 index or 0), and what keeps the addresses alive."""
    axes, alive = [], []
    for axis in collapse(shape, perms):
        if axis.index is None:
            axes.append((axis.size, 0))
            continue
        alive.append(axis.index.to("cpu", torch.int64).contiguous())
        axes.append((axis.size, alive[-1].data_ptr()))
    return axes, alive


def gather(x: Tensor, perms: Mapping[int, Tensor]) -> Tensor:
    """The law: ``out[i] = x[perm[i]]`` along each axis, whole blocks where the index is shorter than the axis."""
    for axis, index in perms.items():
        index = index.to(x.device)
        if index.numel() == x.shape[axis]:
            x = x.index_select(axis, index)
        else:
            n, shape = index.numel(), x.shape
            blocks = x.reshape(*shape[:axis], n, shape[axis] // n, *shape[axis + 1 :])
            x = blocks.index_select(axis, index).reshape(shape)
    return x


def as_lists(
    op: str,
    tensors: Sequence[Tensor | Sequence[Tensor] | None],
    perms: Perms | Sequence[Perms],
    names: str | Sequence[str],
) -> tuple[list[list[Tensor | None]], list[Perms], list[str]]:
    """One tensor or many, as lists of one length."""
    first = tensors[0]
    if isinstance(first, Tensor):
        lists: list[list[Tensor | None]] = [[t] for t in tensors]  # type: ignore[list-item]
        if not isinstance(perms, Mapping):
            raise TypeError(f"{op}: perms must be a mapping from axis to index, not {type(perms).__name__}")
        return lists, [perms], [names if isinstance(names, str) else names[0]]
    assert first is not None
    count = len(first)
    lists = []
    for t in tensors:
        if isinstance(t, Tensor) or (t is not None and len(t) != count):
            raise ValueError(f"{op}: expected lists of {count} tensors")
        lists.append([None] * count if t is None else list(t))
    many = [perms] * count if isinstance(perms, Mapping) else list(perms)
    labels = [names] * count if isinstance(names, str) else list(names)
    if len(many) != count or len(labels) != count:
        raise ValueError(f"{op}: {count} tensors, but {len(many)} perms and {len(labels)} names")
    return lists, many, labels

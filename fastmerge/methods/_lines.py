"""Merging with coefficients for every row, or every column: products along each, mathematics on K numbers, one sum."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .. import _native, ops
from ..ops.gram_blocks import BLOCK
from ._method import Header, TensorStream

Coefficients = Callable[[Tensor], Tensor]  # products [lines, pairs] -> weights [K, lines], line by line, in float64

_GROUP = 8192  # lines that torch computes on one thread
_BLOCK = 1 << 18  # about as many elements of neighbouring rows are added up before they join a column's sum


def longest(lines: Iterable[tuple[Header, int]]) -> int:
    """Bytes that lines longer than a chunk may be take in every worker's buffers; (tensor, elements of its lines) each."""
    held = 0
    for t, line in lines:
        if line > BLOCK:
            at_once = min(math.prod(t.shape) // line, _native.threads())
            held = max(held, at_once * line * (len(t.models) + 2) * max(t.dtype.itemsize, 4))
    return held


def merge_rows(tensor: TensorStream, coefficients: Coefficients, dtype: torch.dtype) -> None:
    """Row by row of the last axis; deltas where there is a base. One read of the inputs."""
    row = tensor.shape[-1]

    def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        origin, matrices = _matrices(base, models, row)
        weight = _by_group(ops.line_gram(origin, matrices), coefficients)
        _put(tensor, offset, origin, matrices, weight, "rows", dtype)

    if tensor.numel:
        tensor.for_each(visit, align=row, block=1)


def merge_columns(tensor: TensorStream, coefficients: Coefficients, dtype: torch.dtype) -> None:
    """Column by column along the first axis; deltas where there is a base. Two reads of the inputs."""
    if not tensor.numel:
        return
    columns = tensor.numel // tensor.shape[0]
    rows = max(1, _BLOCK // columns)  # of a block: what the order of additions depends on
    sums = _InOrder()

    def add(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        origin, matrices = _matrices(base, models, columns)
        for at in range(0, len(matrices[0]), rows):
            part = slice(at, at + rows)
            products = ops.line_gram(
                None if origin is None else origin[part], [m[part] for m in matrices], along="columns"
            )
            sums.add((offset // columns + at) // rows, products)

    tensor.for_each(add, align=rows * columns, block=1)
    weight = _by_group(sums.total(), coefficients)

    def merge(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
        _put(tensor, offset, *_matrices(base, models, columns), weight, "columns", dtype)

    tensor.for_each(merge, align=columns, block=1)


def _matrices(base: Tensor | None, models: list[Tensor], columns: int) -> tuple[Tensor | None, list[Tensor]]:
    return None if base is None else base.reshape(-1, columns), [m.reshape(-1, columns) for m in models]


def _put(
    tensor: TensorStream,
    offset: int,
    base: Tensor | None,
    models: list[Tensor],
    weight: Tensor,
    along: str,
    dtype: torch.dtype,
) -> None:
    place = tensor.place(offset, offset + models[0].numel())
    out = None if place is None else place.view(models[0].shape)
    merged = ops.line_merge(base, models, weight.to(models[0].device), along=along, dtype=dtype, out=out)
    tensor.put(offset, merged.reshape(-1))


def _by_group(products: Tensor, coefficients: Coefficients) -> Tensor:
    """The weights [K, lines] of all lines, none of which depends on how many there are.

    torch computes the last few of an array, and those at the borders between threads, by other instructions: groups are
    filled up, and small enough for one thread.
    """
    groups = []
    for group in products.split(_GROUP):
        filled = torch.nn.functional.pad(group, (0, 0, 0, -len(group) % 64), value=1.0)
        groups.append(coefficients(filled)[:, : len(group)])
    return torch.cat(groups, 1)


class _InOrder:
    """A sum of parts that come in any order, added by their number."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, Tensor] = {}
        self._next = 0
        self._total: Tensor | None = None

    def add(self, number: int, part: Tensor) -> None:
        with self._lock:
            self._waiting[number] = part
            while self._next in self._waiting:
                part = self._waiting.pop(self._next)
                self._total = part if self._total is None else self._total + part
                self._next += 1

    def total(self) -> Tensor:
        assert self._total is not None
        assert not self._waiting
        return self._total

"""Watches every memory access of kernels in Triton's interpreter: bounds, races between programs, bytes moved.

    with memory_guard(*tensors) as guard:
        op(..., backend="triton")
    guard.bytes_loaded, guard.bytes_stored, guard.full_sector_share()

An access outside the tensors that a launch was given (and those named, for kernels that read addresses from a table)
raises OutOfBounds at once. After each launch, an address that one program stores and another one touches raises Race:
programs of a grid run in no order, so such a result is luck on a GPU. Atomics may meet atomics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

SECTOR = 32  # bytes: what a GPU's memory system moves at least
WARP = 32


class OutOfBounds(AssertionError):
    pass


class Race(AssertionError):
    pass


@dataclass
class Access:
    kind: str  # "load", "store" or "atomic"
    kernel: str
    program: tuple[int, int, int]
    addresses: np.ndarray  # of the lanes that are not masked off, in lane order
    itemsize: int
    lanes: int


def _span(t: torch.Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that the tensor's elements occupy."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)


@dataclass
class Guard:
    named: tuple[torch.Tensor, ...]
    accesses: list[Access] = field(default_factory=list)  # of all launches
    launches: list[str] = field(default_factory=list)
    _spans: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    _from: int = 0

    def begin(self, kernel: str, arguments: Any) -> None:
        spans = sorted({_span(t) for t in _tensors([*arguments, *self.named])})
        self._spans = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        self._from = len(self.accesses)
        self.launches.append(kernel)

    def see(self, kind: str, builder: Any, ptrs: Any, mask: Any) -> None:
        if not self.launches:
            return
        itemsize = max(1, interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize)
        lanes = np.broadcast_to(ptrs.data, mask.data.shape)
        addresses = np.ascontiguousarray(lanes[mask.data]).ravel().astype(np.uint64)
        inside = np.zeros(addresses.shape, bool)
        for low, high in self._spans:
            inside |= (addresses >= low) & (addresses + np.uint64(itemsize) <= high)
        if not inside.all():
            bad = int(addresses[~inside][0])
            low, high = min(self._spans.tolist(), key=lambda s: min(abs(bad - s[0]), abs(bad - s[1])))
            raise OutOfBounds(
                f"{self.launches[-1]}: {kind} of {int((~inside).sum())} lanes out of bounds in program "
                f"{builder.grid_idx}; the first is {bad - low} bytes from the start of a tensor of {high - low} bytes"
            )
        self.accesses.append(
            Access(kind, self.launches[-1], tuple(builder.grid_idx), addresses, itemsize, mask.data.size)
        )

    def end(self) -> None:
        log = self.accesses[self._from :]
        programs = {p: i for i, p in enumerate(dict.fromkeys(a.program for a in log))}

        def bytes_of(kinds: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
            where, who = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
            for a in log:
                if a.kind in kinds:
                    spread = a.addresses[:, None] + np.arange(a.itemsize, dtype=np.uint64)
                    where.append(spread.ravel())
                    who.append(np.full(spread.size, programs[a.program]))
            return np.concatenate(where), np.concatenate(who)

        for writers, others in ((("store",), ("load", "store", "atomic")), (("atomic",), ("load", "store"))):
            stored, by = bytes_of(writers)
            if not stored.size:
                continue
            order = np.argsort(stored, kind="stable")
            address, first = np.unique(stored[order], return_index=True)
            low = np.minimum.reduceat(by[order], first)
            high = np.maximum.reduceat(by[order], first)
            touched, toucher = bytes_of(others)
            at = np.clip(np.searchsorted(address, touched), 0, address.size - 1)
            clash = (address[at] == touched) & ((low[at] != toucher) | (high[at] != toucher))
            if clash.any():
                raise Race(
                    f"{self.launches[-1]}: {int(clash.sum())} bytes that one program {writers[0]}s are touched by "
                    "another program of the same launch"
                )

    def _bytes(self, kinds: tuple[str, ...], kernel: str | None) -> int:
        return sum(a.addresses.size * a.itemsize for a in self.accesses
                   if a.kind in kinds and kernel in (None, a.kernel))  # fmt: skip

    @property
    def bytes_loaded(self) -> int:
        return self._bytes(("load",), None)

    @property
    def bytes_stored(self) -> int:
        return self._bytes(("store",), None)

    def bytes_moved(self, kernel: str | None = None) -> int:
        return self._bytes(("load", "store"), kernel)

    def touched(self, t: torch.Tensor) -> int:
        """How many elements of `t` were loaded or stored, counting repetitions."""
        low, high = _span(t)
        return sum(int(((a.addresses >= low) & (a.addresses < high)).sum()) for a in self.accesses)

    def _requests(self, of: tuple[torch.Tensor, ...], kernel: str | None, whole: bool) -> Iterator[tuple[int, int]]:
        """(sectors, those used whole) of each warp request."""
        spans = [_span(t) for t in of]
        for a in self.accesses:
            if a.kind == "atomic" or a.lanes == 1 or not a.addresses.size or kernel not in (None, a.kernel):
                continue
            if (whole and a.addresses.size < a.lanes) or (
                of and not any(low <= int(a.addresses[0]) < high for low, high in spans)
            ):
                continue
            lanes = WARP * max(1, 16 // a.itemsize)
            for i in range(0, a.addresses.size, lanes):
                unique = np.unique(a.addresses[i : i + lanes])
                _, counts = np.unique(unique // SECTOR, return_counts=True)
                yield counts.size, int((counts * a.itemsize == SECTOR).sum())

    def sectors(self) -> int:
        """How many 32-byte sectors the warp requests move, scattered ones included."""
        return sum(total for total, _ in self._requests((), None, False))

    def full_sector_share(self, *of: torch.Tensor, kernel: str | None = None, whole: bool = False) -> float:
        """Of the 32-byte sectors that warp requests touch, the share that is used whole.

        The interpreter knows no threads: a block access is cut into requests as the compiler lays out a coalesced one,
        16 bytes a thread in lane order, 32 threads a warp. Scalars (tables, thresholds) are not counted; with `of`, nor is
        anything but these tensors; with `kernel`, nor are others; with `whole`, nor are accesses that a mask thins out.
        """
        counts = list(self._requests(of, kernel, whole))
        full, total = sum(f for _, f in counts), sum(t for t, _ in counts)
        return full / total if total else 1.0


@contextlib.contextmanager
def memory_guard(*named: torch.Tensor) -> Iterator[Guard]:
    guard = Guard(named)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, rmw, cas = (
        getattr(builder, f"create_{n}") for n in ("masked_load", "masked_store", "atomic_rmw", "atomic_cas")
    )
    call = executor.__call__

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        guard.see("load", self, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.see("store", self, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def atomic_rmw(self: Any, op: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        guard.see("atomic", self, ptrs, mask)
        return rmw(self, op, ptrs, value, mask, *rest)

    def atomic_cas(self: Any, ptrs: Any, *rest: Any) -> Any:
        everywhere = interpreter.TensorHandle(np.ones_like(ptrs.data, dtype=bool), ptrs.dtype)
        guard.see("atomic", self, ptrs, everywhere)
        return cas(self, ptrs, *rest)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard.begin(self.fn.__name__, [*args, *kwargs.values()])
        result = call(self, *args, **kwargs)
        guard.end()
        return result

    with (
        mock.patch.object(builder, "create_masked_load", masked_load),
        mock.patch.object(builder, "create_masked_store", masked_store),
        mock.patch.object(builder, "create_atomic_rmw", atomic_rmw),
        mock.patch.object(builder, "create_atomic_cas", atomic_cas),
        mock.patch.object(executor, "__call__", launch),
    ):
        yield guard

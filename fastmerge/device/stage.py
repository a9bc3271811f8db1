"""Buffers in flight on one device.

A slot holds one chunk: pinned and device memory for its inputs and for its result. A worker takes the oldest slot; if its
last chunk is still under way, the worker waits for it and stores its result; then it reads the next chunk into the pinned
memory and queues copy, merge and copy back on three streams. So disk, bus (both directions) and kernels overlap, also
from one tensor to the next, and memory is slots x chunk, whatever the size of tensors.

The order, per chunk:  host reads files -> [up] copy in -> [compute] merge -> [down] copy back -> host stores the result,
and the slot is free. `compute` waits for `up`, `down` for `compute`, the host for `down`. Nothing else needs ordering:
a slot's memory is touched by one chunk at a time.

Small tensors share a slot (a `Parcel`): one copy each way for all of them, and one launch where the operator has one for
many tensors, since a launch costs more than they do. It leaves when it is full, or with the last tensor.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._dispatch import Batch, batched
from .budget import Budget
from .protocol import Device

WIDE = 16  # bytes: what lies in a slot begins at multiples, as the widest accesses need
TRANSFORM = 4  # times its own size that a collected tensor takes while it is transformed (FFT: spectrum and workspace)


class Slot:
    """Memory of one chunk in flight, and what to do when it comes back."""

    def __init__(self, device: Device, budget: Budget) -> None:
        self.device = device
        self._host_in, self._there_in = device.pinned(budget.input_bytes), device.memory(budget.input_bytes)
        self._host_out, self._there_out = device.pinned(budget.output_bytes), device.memory(budget.output_bytes)
        self.used = 0  # bytes of the inputs' memory
        self.given = 0  # of the result's
        self._event: object | None = None
        self._store: Callable[[], None] | None = None

    def inputs(self, dtypes: Sequence[torch.dtype], numel: int) -> tuple[list[Tensor], list[Tensor]]:
        """Flat tensors for inputs, after those given out: in pinned memory, and where they will be on the device."""
        host, there, at = [], [], self.used
        for dtype in dtypes:
            size = numel * dtype.itemsize
            host.append(self._host_in[at : at + size].view(dtype))
            there.append(self._there_in[at : at + size].view(dtype))
            at += -(-size // WIDE) * WIDE
        self.used = min(at, len(self._host_in))
        return host, there

    def result(self, dtype: torch.dtype, numel: int) -> tuple[Tensor, Tensor]:
        """Flat tensors for a result, after those given out: in pinned memory and on the device."""
        here = slice(self.given, self.given + numel * dtype.itemsize)
        self.given = min(-(-here.stop // WIDE) * WIDE, len(self._host_out))
        return self._host_out[here].view(dtype), self._there_out[here].view(dtype)

    def results(self) -> tuple[Tensor, Tensor]:
        """The bytes of all results given out."""
        return self._host_out[: self.given], self._there_out[: self.given]

    def fits(self, dtypes: Sequence[torch.dtype], out: torch.dtype, numel: int) -> bool:
        """Whether a tensor's inputs and result have room beside what is given out."""
        inputs = sum(-(-numel * d.itemsize // WIDE) * WIDE for d in dtypes)
        return self.used + inputs <= len(self._host_in) and self.given + numel * out.itemsize <= len(self._host_out)

    def copy_in(self, stream: object) -> None:
        """Queue one copy of all inputs."""
        if self.used:
            self.device.copy(self._there_in[: self.used], self._host_in[: self.used], stream)

    def pending(self, event: object, store: Callable[[], None] | None) -> None:
        """The chunk is under way: its memory is free, and `store` may run, after `event`."""
        self._event, self._store = event, store

    def settle(self) -> None:
        """Wait for the chunk under way, if any, and store its result."""
        event, store = self._event, self._store
        self._event = self._store = None
        self.used = self.given = 0
        if event is not None:
            self.device.synchronize(event)
        if store is not None:
            store()

    def abandon(self) -> None:
        """Wait for the chunk under way and drop its result."""
        self._store = None
        self.settle()


@dataclass
class Parcel:
    """Small tensors in one slot: what is to be done with each, in order."""

    slot: Slot
    numel: int = 0
    work: list[Callable[[Batch], None]] = field(default_factory=list)
    store: list[Callable[[], None]] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)


class Stage:
    """One device with its streams and slots."""

    def __init__(self, device: Device, budget: Budget) -> None:
        self.device, self.budget = device, budget
        self.up, self.compute, self.down = (device.stream(n) for n in ("up", "compute", "down"))
        self._every: list[Slot] = []
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._work: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._parcel: Parcel | None = None  # of the thread that gives the stage its tensors
        self.small = min(Batch.SMALL, budget.chunk)  # elements up to which a tensor shares a slot
        self.bytes_up = 0
        self.bytes_down = 0
        self.left_out: dict[str, int] = {}  # tensors merged on the CPU, with the bytes they would have needed

    def _take(self) -> Slot:
        with self._lock:
            if len(self._every) < self.budget.slots:
                self._every.append(Slot(self.device, self.budget))
                return self._every[-1]
        slot = self._free.get()
        try:
            slot.settle()
        except BaseException:
            self._free.put(slot)
            raise
        return slot

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """The slot that has been under way longest, settled; it goes to the end of the line."""
        slot = self._take()
        try:
            yield slot
        finally:
            self._free.put(slot)

    def parcel(self, dtypes: Sequence[torch.dtype], out: torch.dtype, numel: int) -> Parcel:
        """The parcel that a tensor of at most `small` elements, with inputs of these dtypes, goes in."""
        held = self._parcel
        if held is not None and (held.numel + numel > self.budget.chunk or not held.slot.fits(dtypes, out, numel)):
            self.send()
            held = None
        if held is None:
            self._parcel = held = Parcel(self._take())
        held.numel += numel
        return held

    def send(self) -> None:
        """Queue the parcel, if there is one."""
        parcel, self._parcel = self._parcel, None
        if parcel is None:
            return

        def work() -> None:
            with batched() as batch:
                for one in parcel.work:
                    one(batch)

        def store() -> None:
            for one in parcel.store:
                one()

        try:
            self.merge(parcel.slot, work, parcel.reads, parcel.writes, parcel.slot.results(), store)
        finally:
            self._free.put(parcel.slot)

    def pieces(self, numel: int, align: int = 1) -> list[tuple[int, int]] | None:
        """(begin, end) of the chunks of a tensor, beginning at multiples of `align`; None when a row is too long."""
        step = self.budget.chunk // max(align, 1) * max(align, 1)
        if step == 0:
            return None
        return [(begin, min(begin + step, numel)) for begin in range(0, numel, step)]

    def merge(
        self,
        slot: Slot,
        work: Callable[[], None],
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        back: tuple[Tensor, Tensor] | None,
        store: Callable[[], None] | None,
    ) -> None:
        """Queue a chunk whose pinned inputs are filled: copy in, `work`, and copy `back` (to, from) for `store`."""
        device = self.device
        with self._lock:  # chunks enter the streams one after another; temporaries of one chunk at a time
            slot.copy_in(self.up)
            copied = device.record(self.up)
            slot.pending(copied, None)  # should the work fail, its inputs are still on their way
            device.wait(self.compute, copied)
            device.run(work, self.compute, reads, writes)
            event = device.record(self.compute)
            self.bytes_up += slot.used
            if back is not None:
                device.wait(self.down, event)
                device.copy(*back, self.down)
                event = device.record(self.down)
                self.bytes_down += back[0].nbytes
            slot.pending(event, store)

    def then(self, work: Callable[[], None], touches: Tensor) -> None:
        """Queue `work` on a collected tensor, after everything that filled it."""
        with self._lock:
            self.device.run(work, self.compute, [touches], [touches])

    def collected(self, key: str, numel: int, dtype: torch.dtype) -> Tensor | None:
        """Device memory for a whole tensor, reused from tensor to tensor; None when it does not fit the budget."""
        nbytes = numel * dtype.itemsize
        others = sum(t.numel() for k, t in self._work.items() if k != key)
        if TRANSFORM * nbytes + others > self.budget.collect_bytes:
            return None
        held = self._work.get(key)
        if held is None or held.numel() < nbytes:
            if held is not None:  # kernels may still be using it
                self.device.synchronize(self.device.record(self.compute))
                del self._work[key], held
            self._work[key] = held = self.device.memory(nbytes)
        return held[:nbytes].view(dtype)

    def flush(self) -> None:
        """Send the parcel, wait for every chunk under way and store its result. Not while workers are in `slot`."""
        self.send()
        for _ in range(len(self._every)):  # those there are: taking one could make another
            slot = self._free.get()
            try:
                slot.settle()
            finally:
                self._free.put(slot)

    def abandon(self) -> None:
        """After a failure: wait for the device, store nothing."""
        self._parcel = None
        for slot in self._every:
            slot.abandon()

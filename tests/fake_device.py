"""A device without hardware, for the engine's GPU pipeline: it computes on the CPU, as late as the order allows.

Queued copies and work run only when the host waits for an event that they lead to, oldest first, and nothing that does not
lead to it: what was not ordered has not happened. With ``uploads="early"`` copies to the device run as soon as they may,
so that a buffer filled too early shows. Fresh memory holds NaNs. While work runs, every byte of device memory that it did
not name is poisoned too, and must still be poison afterwards. Independently of what happens to run when, operations that
touch the same bytes without an order between them are reported (:attr:`FakeDevice.problems`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

POISON = 0xFF  # four of them are a NaN in every float format


def span(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


@dataclass
class Operation:
    number: int
    stream: str
    kind: str
    does: Callable[[], object]
    reads: list[tuple[int, int]]
    writes: list[tuple[int, int]]
    before: int  # bit i: operation i happens before this one
    done: bool = False


@dataclass
class Queue:
    name: str
    before: int = 0  # what whatever is queued next comes after


@dataclass
class Event:
    before: int


@dataclass
class FakeDevice:
    """`faults` plants bugs: names of orderings that are left out, as in :data:`FAULTS`."""

    name: str = "cuda:0"
    free: int = 1 << 30
    bus: float = 25e9
    uploads: str = "late"
    faults: tuple[str, ...] = ()
    log: list[Operation] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    held: int = 0  # bytes of device memory
    peak: int = 0
    copied: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    most_in_flight: int = 0
    _known: int = 0  # what the host knows to have happened
    _memory: list[weakref.ref[Tensor]] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def free_bytes(self) -> int:
        return self.free

    def bandwidth(self) -> float:
        return self.bus

    def pinned(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def memory(self, nbytes: int) -> Tensor:
        made = torch.full((nbytes,), POISON, dtype=torch.uint8)
        with self._lock:
            self.held += nbytes
            self.peak = max(self.peak, self.held)
            self._memory.append(weakref.ref(made))
        weakref.finalize(made, self._freed, nbytes)
        return made

    def _freed(self, nbytes: int) -> None:
        self.held -= nbytes

    def stream(self, name: str) -> Queue:
        return Queue(name)

    def copy(self, to: Tensor, source: Tensor, stream: Queue) -> None:
        assert to.numel() == source.numel()
        assert to.dtype == source.dtype
        with self._lock:
            self.copied[stream.name] += to.nbytes
            made = self._queue(stream, "copy", lambda: to.copy_(source), [source], [to])
            if stream.name == "up" and self.uploads == "early":
                self._execute(made.before | 1 << made.number)

    def run(self, work: Callable[[], None], stream: Queue, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        with self._lock:
            self._queue(stream, "run", lambda: self._alone(work, [*reads, *writes]), reads, writes)

    def record(self, stream: Queue) -> Event:
        return Event(stream.before)

    def wait(self, stream: Queue, event: Event) -> None:
        if f"{stream.name} does not wait" not in self.faults:
            stream.before |= event.before

    def synchronize(self, event: Event) -> None:
        with self._lock:
            self.most_in_flight = max(self.most_in_flight, sum(not o.done and o.kind == "run" for o in self.log))
            if "host does not wait" not in self.faults:
                self._execute(event.before)
                self._known |= event.before

    def _queue(
        self, stream: Queue, kind: str, does: Callable[[], object], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> Operation:
        number = len(self.log)
        made = Operation(
            number, stream.name, kind, does, [span(t) for t in reads], [span(t) for t in writes],
            stream.before | self._known,
        )  # fmt: skip
        for other in self.log:
            if not made.before >> other.number & 1:
                self._compare(other, made)
        self.log.append(made)
        stream.before |= made.before | 1 << number
        return made

    def _compare(self, first: Operation, second: Operation) -> None:
        for a, b in (
            (first.writes, second.writes),
            (first.writes, second.reads),
            (first.reads, second.writes),
        ):
            if any(overlap(x, y) for x in a for y in b):
                said = f"{second.kind} on {second.stream} is not ordered after {first.kind} on {first.stream}"
                self.problems.append(said)

    def _execute(self, wanted: int) -> None:
        for o in self.log:
            if wanted >> o.number & 1 and not o.done:
                o.done = True
                o.does()

    def _alone(self, work: Callable[[], None], named: Sequence[Tensor]) -> None:
        """Run work while all device memory that it did not name is poison."""
        hidden: list[tuple[Tensor, Tensor]] = []
        for ref in self._memory:
            memory = ref()
            if memory is None:
                continue
            start, stop = span(memory)
            cuts = sorted(
                (max(a, start) - start, min(b, stop) - start)
                for a, b in map(span, named)
                if overlap((a, b), (start, stop))
            )
            at = 0
            for a, b in [*cuts, (stop - start, stop - start)]:
                if a > at:
                    part = memory[at:a]
                    hidden.append((part, part.clone()))
                    part.fill_(POISON)
                at = max(at, b)
        work()
        for part, saved in hidden:
            if not bool((part == POISON).all()):
                self.problems.append("work wrote memory that it did not name")
            part.copy_(saved)


FAULTS = ("compute does not wait", "down does not wait", "host does not wait")

"""How a call is timed on a GPU: events around it, a cold L2 cache, a CUDA graph where launching is what takes the time.

The decisions are here, the device behind :class:`Runtime`, so that they can be tested without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
REPEATS = 20  # calls in one graph
LAUNCH_BOUND = 0.5  # host seconds of a call over its device seconds, from which a graph is used
MAX_COPIES = 64


class Runtime(Protocol):
    """A device and its clocks."""

    def flush(self) -> None:
        """Write more than the L2 cache holds."""
        ...

    def elapsed(self, call: Call) -> tuple[float, float]:
        """(device seconds between events around the call, host seconds until it returned)."""
        ...

    def capture(self, calls: Sequence[Call]) -> Call:
        """A CUDA graph that runs the calls one after another; RuntimeError where they can not be captured."""
        ...


@dataclass(frozen=True)
class Plan:
    """How a call is timed."""

    how: str  # "events" or "graph"
    call: Call
    per: int  # calls of the operator in one timed call
    flush: bool  # of the L2 cache before each; a graph rotates its inputs instead
    inputs: tuple[Call, ...] = ()  # kept alive: a graph reads their memory, and does not own it

    def once(self, runtime: Runtime) -> float:
        """Device seconds of one call of the operator."""
        if self.flush:
            runtime.flush()
        return runtime.elapsed(self.call)[0] / self.per


def plan(runtime: Runtime, call: Call, rotated: Callable[[], Sequence[Call]] | None) -> Plan:
    """Events, or a graph of REPEATS calls over rotated inputs where the host takes at least half as long as the device.

    rotated: makes the same call on copies of its inputs; None for a call that may not be repeated as it is.
    """
    call()
    runtime.flush()
    device, host = min(runtime.elapsed(call) for _ in range(3))
    if rotated is not None and host >= LAUNCH_BOUND * device:
        try:
            calls = rotated()
            graph = runtime.capture([calls[i % len(calls)] for i in range(REPEATS)])
        except RuntimeError:  # it allocates, waits for the device, or looks at values: events still time it
            pass
        else:
            return Plan("graph", graph, REPEATS, flush=False, inputs=tuple(calls))
    return Plan("events", call, 1, flush=True)


def copies(nbytes: int, l2_bytes: int) -> int:
    """Copies of inputs of `nbytes` that together are twice the L2 cache, so that none is found in it again."""
    return max(1, min(MAX_COPIES, math.ceil(2 * l2_bytes / max(nbytes, 1))))


class CudaRuntime:
    """Runtime of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.l2_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self._junk = torch.empty(max(4 * self.l2_bytes, 64 << 20), dtype=torch.uint8, device=device)

    def flush(self) -> None:
        self._junk.zero_()

    def elapsed(self, call: Call) -> tuple[float, float]:
        import time

        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3, host

    def capture(self, calls: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

"""CUDA devices through torch.cuda: the implementation of :class:`Device` that runs on hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PROBE = 64 << 20  # bytes copied to measure the bus


def why_none() -> str | None:
    """None when torch can use a GPU, else the reason."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build"
    return "torch finds no GPU, or no driver for it"


class TorchDevice:
    """One GPU. Allocations come from torch's caching allocator, kernels run on the stream that is current."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.name = f"cuda:{index}"

    def free_bytes(self) -> int:
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free

    def bandwidth(self) -> float:
        host, there = self.pinned(PROBE), self.memory(PROBE)
        stream = self.stream("probe")
        best = 0.0
        for _ in range(4):  # the first copy also maps the memory
            with torch.cuda.stream(stream):
                before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                before.record(stream)
                there.copy_(host, non_blocking=True)
                after.record(stream)
            after.synchronize()
            best = max(best, PROBE / (before.elapsed_time(after) * 1e-3))
        return best

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True, device="cpu")

    def memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def stream(self, name: str) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def copy(self, to: Tensor, source: Tensor, stream: torch.cuda.Stream) -> None:
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    def run(
        self, work: Callable[[], None], stream: torch.cuda.Stream, reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        with torch.cuda.stream(stream), torch.no_grad():
            work()

    def record(self, stream: torch.cuda.Stream) -> Any:
        return stream.record_event(torch.cuda.Event(blocking=True))

    def wait(self, stream: torch.cuda.Stream, event: Any) -> None:
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        event.synchronize()


def devices() -> list[TorchDevice]:
    """Every GPU torch sees; empty without one."""
    return [TorchDevice(i) for i in range(torch.cuda.device_count())] if why_none() is None else []

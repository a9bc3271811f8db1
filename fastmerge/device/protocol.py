"""What the engine needs of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor


class Device(Protocol):
    """Memory, queues and the order between them. Copies and work are queued; only `synchronize` waits.

    Operations on one stream run in order; between streams, only what an event orders is ordered. Streams and events are
    whatever the implementation makes them.
    """

    name: str  # "cuda:0"

    def free_bytes(self) -> int:
        """Device memory that can be allocated now."""
        ...

    def bandwidth(self) -> float:
        """Bytes a second of a large copy from pinned memory, one direction, measured now."""
        ...

    def pinned(self, nbytes: int) -> Tensor:
        """Page-locked host memory, as a uint8 tensor."""
        ...

    def memory(self, nbytes: int) -> Tensor:
        """Device memory, as a uint8 tensor; its address is a multiple of 256."""
        ...

    def stream(self, name: str) -> Any:
        """A new queue."""
        ...

    def copy(self, to: Tensor, source: Tensor, stream: Any) -> None:
        """Queue a copy between pinned and device memory of the same size."""
        ...

    def run(self, work: Callable[[], None], stream: Any, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Queue what `work` does on `stream`. `reads` and `writes` name all device memory that it touches."""
        ...

    def record(self, stream: Any) -> Any:
        """An event that happens when everything queued on `stream` so far is done."""
        ...

    def wait(self, stream: Any, event: Any) -> None:
        """Whatever is queued on `stream` from now on runs after `event`."""
        ...

    def synchronize(self, event: Any) -> None:
        """Return once `event` has happened; raise what went wrong on the device."""
        ...

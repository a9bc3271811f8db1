"""Time and memory of one step of the demo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..report import Clock
from .worker import cores


@dataclass
class Cost:
    """seconds: wall clock; cpu: seconds of all threads; memory: bytes that the resident set grew by at its highest
    (None where the kernel keeps no resettable record of it, as outside Linux)."""

    seconds: float = 0.0
    cpu: float = 0.0
    memory: int | None = None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _reset_peak() -> int | None:
    """Start a new record of the highest resident set; the present one in bytes, None when that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


@contextmanager
def measured() -> Iterator[Cost]:
    """``with measured() as cost:`` fills `cost` at the end of the block."""
    cost, before, clock = Cost(), _reset_peak(), Clock()
    yield cost
    cost.seconds, cost.cpu = clock.wall(), clock.cpu()
    if before is not None:
        cost.memory = max(0, _status("VmHWM") - before)


def machine() -> str:
    """Processor, cores this process may use, memory."""
    model = "unknown processor"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {cores()} cores, {gib:.0f} GiB"

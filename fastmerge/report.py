"""What a merge did: printed as a table, written as fastmerge_report.json."""

from __future__ import annotations

import json
import platform
import resource
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import __version__


@dataclass
class TensorReport:
    """One output tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    how: str  # "merged", "copied" (integer buffer or identical), "resumed"
    seconds: float
    bytes_read: int
    bytes_written: int


@dataclass
class Report:
    """Times in seconds, memory and disk in bytes. ``planned`` reports (dry runs) carry estimates only."""

    method: str
    models: list[str]
    base: str | None
    out: str | None
    device: str = "cpu"  # that merges; `where` has it by pass
    where: dict[str, str] = field(default_factory=dict)
    device_bytes: list[dict[str, Any]] = field(default_factory=list)  # copied to and from each GPU
    workers: int = 1
    chunk_elements: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_rss: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    planned: bool = False
    estimate: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    cosines: dict[str, Any] | None = None  # between the models' deltas: similarity.Cosines.report
    files: dict[str, int] = field(default_factory=dict)  # what the method wrote beside the model: path -> bytes
    notes: list[str] = field(default_factory=list)
    tensors: list[TensorReport] = field(default_factory=list)
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "fastmerge": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, default=str) + "\n"


def peak_rss() -> int:
    """Highest resident set of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Wall and CPU seconds (this process, all threads) since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def wall(self) -> float:
        return time.perf_counter() - self._wall

    def cpu(self) -> float:
        return time.process_time() - self._cpu

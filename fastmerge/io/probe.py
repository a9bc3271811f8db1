"""How fast this disk is right now, for the time in a plan: a lower bound of a merge, which also computes."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

_SAMPLE = 32 << 20  # bytes; tens of milliseconds on a slow disk


def io_seconds(bytes_read: int, bytes_written: int, source: Path, folder: Path) -> tuple[float, str]:
    """Seconds that reading and writing take at the speeds of a short probe, and a sentence with these speeds.

    Reads up to 32 MiB of `source` (the page cache counts, as it will in the merge) and writes as much to a nameless
    file in `folder`, with fsync; a folder that can not be written to is left out of the sum.
    """
    read = _read_speed(source)
    seconds = bytes_read / read
    said = f"reading at {read / 1e9:.1f} GB/s"
    written = _write_speed(folder)
    if written is not None:
        seconds += bytes_written / written
        said += f", writing at {written / 1e9:.1f} GB/s"
    return seconds, f"{said} (probed now)"


def _read_speed(source: Path) -> float:
    buffer = bytearray(1 << 20)
    done = 0
    with open(source, "rb", buffering=0) as f:
        start = time.perf_counter()
        while done < _SAMPLE and (got := f.readinto(buffer)):
            done += got
        return max(done, 1) / max(time.perf_counter() - start, 1e-9)


def _write_speed(folder: Path) -> float | None:
    block = bytes(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as f:
            start = time.perf_counter()
            for _ in range(_SAMPLE >> 20):
                f.write(block)
            os.fsync(f.fileno())
            return _SAMPLE / max(time.perf_counter() - start, 1e-9)
    except OSError:
        return None

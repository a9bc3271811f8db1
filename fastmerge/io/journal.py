"""What an unfinished job has done: one JSON line per finished tensor, appended and flushed after its bytes.

The first line identifies the job (recipe, inputs, layout of the output); resuming another job is refused. A tensor's
line carries an xxh3 checksum per piece, so that resuming trusts the bytes that are there, not that they were written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any, TextIO

from ..errors import BadInput

NAME = "journal.jsonl"
VERSION = 1


def fingerprint(job: Any) -> str:
    """A stable hash of whatever decides the job's bytes (JSON-serialisable)."""
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """Open with `create` or `resume`; one process at a time holds a job's journal."""

    def __init__(self, file: TextIO, finished: dict[str, dict[str, Any]]) -> None:
        self._file = file
        self.finished = finished  # tensor name -> its line

    @classmethod
    def create(cls, folder: Path, job: str) -> Journal:
        file = (folder / NAME).open("x")
        _lock(file, folder)
        journal = cls(file, {})
        journal._write({"fastmerge_journal": VERSION, "job": job})
        return journal

    @staticmethod
    def check_idle(folder: Path) -> None:
        """Raises BadInput when another process holds the folder's journal."""
        if (folder / NAME).exists():
            with (folder / NAME).open("r+") as file:
                _lock(file, folder)

    @classmethod
    def resume(cls, folder: Path, job: str) -> Journal:
        """Raises BadInput when the folder's journal is missing, damaged at its head, or of another job."""
        path = folder / NAME
        try:
            file = path.open("r+")
        except OSError as error:
            raise BadInput(
                "there is no interrupted job to resume", where=str(folder), remedy="run without --resume"
            ) from error
        _lock(file, folder)
        try:
            finished, good = _read(file, path, job)
        except BaseException:
            file.close()
            raise
        file.seek(good)
        file.truncate()
        return cls(file, finished)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")
        self._file.flush()

    def done(self, tensor: str, pieces: list[tuple[int, int, str]]) -> None:
        """Record a finished tensor: (first byte, number of bytes, xxh3) of pieces that cover it."""
        entry = {"tensor": tensor, "pieces": pieces}
        self.finished[tensor] = entry
        self._write(entry)

    def close(self) -> None:
        self._file.close()


def _read(file: TextIO, path: Path, job: str) -> tuple[dict[str, dict[str, Any]], int]:
    """Finished tensors, and how many bytes of the journal are whole lines."""
    finished: dict[str, dict[str, Any]] = {}
    good = 0
    head: dict[str, Any] | None = None
    for line in file:
        try:
            entry = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            entry = None
        if entry is None:
            break  # the last line was cut off; whatever it described is done again
        if head is None:
            head = entry
        else:
            finished[entry["tensor"]] = entry
        good += len(line.encode())
    if head is None or head.get("fastmerge_journal") != VERSION:
        raise BadInput("the journal is damaged", where=str(path), remedy="start over with --force")
    if head.get("job") != job:
        raise BadInput(
            "the interrupted job was a different one (recipe, options or input files changed since)",
            where=str(path),
            remedy="resume with the same recipe and inputs, or start over with --force",
        )
    return finished, good


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise BadInput(
            "another process is working on this job", where=str(folder), remedy="wait for it, or stop it first"
        ) from error

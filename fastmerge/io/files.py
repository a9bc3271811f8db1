"""Pieces of tensors out of open files, by position, from any thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from .. import _native
from .safetensors import Entry, became_shorter, bytes_of, pread_into

AHEAD = 8 << 20  # bytes the kernel is told to read ahead of a chunk

Piece = tuple[Entry, int, int, Tensor]  # a tensor, the first element and the one after the last, where they go


class Files:
    """Open file descriptors by path, for positional reads."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.tick: Callable[[], None] | None = None  # called after every read

    def fd(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._fds[path]

    def load(self, pieces: Sequence[Piece], *, count: bool = False) -> list[int] | None:
        """Elements [begin, end) of each tensor into a flat buffer of its dtype.

        count: look for NaN and Inf on the way.

        Returns: how many each piece has; None where nothing was looked for (never without the native module).
        Raises BadInput where a file ends before what its header promised, OSError where it can not be read.
        """
        places = [
            (self.fd(entry.file), entry.begin + begin * entry.dtype.itemsize, (end - begin) * entry.dtype.itemsize)
            for entry, begin, end, _ in pieces
        ]
        nonfinite: list[int] | None = None
        if _native.why_not() is None:
            addresses = [into.data_ptr() for *_, into in pieces]
            types = [_native.DTYPES[entry.dtype] if count else -1 for entry, *_ in pieces]
            failed, code, found = _native.lib().read_pieces(places, addresses, types)
            self._raise(failed, code, [entry.file for entry, *_ in pieces])
            nonfinite = found if count else None
        else:
            for (fd, position, nbytes), (entry, _, _, into) in zip(places, pieces, strict=True):
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, position + AHEAD, nbytes, os.POSIX_FADV_WILLNEED)
                pread_into(fd, bytes_of(into), position, entry.file)
        self._count(sum(nbytes for *_, nbytes in places))
        return nonfinite

    def load_spans(self, entry: Entry, starts: Sequence[int], length: int, into: Tensor) -> None:
        """`length` elements from each of `starts`, one span after the other; raises as :meth:`load`."""
        fd, size = self.fd(entry.file), entry.dtype.itemsize
        positions = [entry.begin + start * size for start in starts]
        if _native.why_not() is None:
            failed, code = _native.lib().read_spans(fd, positions, length * size, into.data_ptr())
            self._raise(failed, code, [entry.file] * len(positions))
        else:
            raw = bytes_of(into)
            for i, position in enumerate(positions):
                pread_into(fd, raw[i * length * size : (i + 1) * length * size], position, entry.file)
        self._count(len(positions) * length * size)

    def _raise(self, index: int, code: int, paths: Sequence[Path]) -> None:
        if index < 0:
            return
        if code < 0:
            raise became_shorter(paths[index])
        raise OSError(code, os.strerror(code), str(paths[index]))

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes
        if self.tick is not None:
            self.tick()

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

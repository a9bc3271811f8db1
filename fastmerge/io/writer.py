"""The output checkpoint: planned whole, filled by position in any order, published by one rename.

All shapes are known before work starts, so every shard's header is written and its space reserved first (a full disk
shows then); tensors are filled by position from any thread. Work happens in a hidden sibling of the output folder and
is renamed at the end: what a crash leaves is nothing at the output path and a folder that `--resume` finishes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from ..errors import BadInput
from .journal import NAME, Journal
from .safetensors import build_header, bytes_of

SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "chat_template*", "preprocessor_config.json", "processor_config.json", "*.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """Where an output tensor goes."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Every shard's header and every tensor's place."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    slots: dict[str, Slot]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())


def plan_layout(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...], str | None]],
    *,
    max_shard_bytes: int | None,
    metadata: Mapping[str, str],
) -> Layout:
    """Assign tensors (name, dtype, shape, the shard it has in the base or None) to shards.

    Without `max_shard_bytes` the base's own split is kept; with it, tensors fill shards in order. Files are named as
    Hugging Face does: model.safetensors, or model-00001-of-0000N.safetensors.
    """
    groups: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = []
    if max_shard_bytes is None:
        by_shard: dict[str | None, list[tuple[str, torch.dtype, tuple[int, ...]]]] = {}
        for name, dtype, shape, shard in tensors:
            by_shard.setdefault(shard, []).append((name, dtype, shape))
        groups = list(by_shard.values())
    else:
        room = 0
        for name, dtype, shape, _ in tensors:
            nbytes = dtype.itemsize * _numel(shape)
            if not groups or nbytes > room:
                groups.append([])
                room = max_shard_bytes
            groups[-1].append((name, dtype, shape))
            room -= nbytes
    count = len(groups)
    headers, sizes, slots = {}, {}, {}
    for i, group in enumerate(groups):
        shard = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        raw, places = build_header(group, dict(metadata))
        headers[shard] = raw
        sizes[shard] = len(raw) + sum(nbytes for _, nbytes in places.values())
        for name, dtype, shape in group:
            slots[name] = Slot(shard, dtype, shape, *places[name])
    return Layout(headers, sizes, slots)


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def work_folder(out: Path) -> Path:
    """The hidden sibling in which a job for `out` works."""
    return out.parent / f".{out.name}.fastmerge"


def check_target(out: Path, layout_bytes: int, *, force: bool, resume: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse, before anything is written, an output that is in use or a disk without room."""
    if out.exists() and not out.is_dir():
        raise BadInput("the output path is a file", where=str(out), remedy="give a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise BadInput(
            "the output folder is not empty", where=str(out), remedy="give another folder, or --force to replace it"
        )
    for folder in inputs:
        if out.resolve() == folder.resolve():
            raise BadInput("the output folder is one of the inputs", where=str(out), remedy="give another folder")
    work = work_folder(out)
    if work.exists() and not (resume or force):
        raise BadInput(
            "an interrupted job for this output was found",
            where=str(work),
            remedy="--resume to finish it, or --force to start over",
        )
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise BadInput(f"{parent} is a file, not a folder", where=str(out), remedy="give another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(
            f"nothing may be written to {parent}", where=str(out), remedy="change its permissions, or write elsewhere"
        )
    held = sum(f.stat().st_blocks * 512 for f in work.glob("*")) if work.exists() else 0
    free = shutil.disk_usage(parent).free + held
    if layout_bytes > free:
        raise BadInput(
            f"the output needs {layout_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free",
            where=str(parent),
            remedy="free some space or write to another disk",
        )


class Writer:
    """Fills the shards of a layout in the work folder; `publish` makes it the output."""

    def __init__(self, out: Path, layout: Layout, journal: Journal, fds: dict[str, int]) -> None:
        self.out, self.layout, self.journal = out, layout, journal
        self.work = work_folder(out)
        self._fds = fds
        self._pieces: dict[str, list[tuple[int, int, str]]] = {}
        self._lock = threading.Lock()
        self.bytes_written = 0

    @classmethod
    def start(cls, out: Path, layout: Layout, job: str, *, resume: bool, force: bool) -> Writer:
        """Create (or reopen) the work folder with every shard at full size and its header written."""
        work = work_folder(out)
        if work.exists() and resume:
            journal = Journal.resume(work, job)
        else:
            if work.exists() and force:
                Journal.check_idle(work)
                shutil.rmtree(work)
            work.mkdir(parents=True)
            journal = Journal.create(work, job)
        fds: dict[str, int] = {}
        try:
            for shard, size in layout.sizes.items():
                fds[shard] = os.open(work / shard, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                _reserve(fds[shard], size)
                os.pwrite(fds[shard], layout.headers[shard], 0)
        except OSError as error:
            for fd in fds.values():
                os.close(fd)
            journal.close()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                if not resume:
                    shutil.rmtree(work, ignore_errors=True)
                raise BadInput(
                    "the disk is full", where=str(work), remedy="free some space or write to another disk"
                ) from error
            raise
        writer = cls(out, layout, journal, fds)
        writer._forget_damaged()
        return writer

    def _forget_damaged(self) -> None:
        """Drop journal entries whose bytes are not what their checksums say."""
        for name, entry in list(self.journal.finished.items()):
            slot = self.layout.slots.get(name)
            if slot is None or not _intact(self._fds[slot.shard], slot, entry["pieces"]):
                del self.journal.finished[name]

    @property
    def finished(self) -> set[str]:
        """Names of tensors that are complete."""
        return set(self.journal.finished)

    def put(self, name: str, offset: int, values: Tensor) -> None:
        """Write a flat chunk that begins at element `offset` of tensor `name`; thread-safe."""
        slot = self.layout.slots[name]
        raw = bytes_of(values.contiguous())
        begin = offset * slot.dtype.itemsize
        checksum = xxhash.xxh3_64_hexdigest(raw)
        done = 0
        while done < len(raw):
            done += os.pwrite(self._fds[slot.shard], raw[done:], slot.begin + begin + done)
        with self._lock:
            self._pieces.setdefault(name, []).append((begin, len(raw), checksum))
            self.bytes_written += len(raw)

    def finish(self, name: str) -> None:
        """The tensor is complete: check that no byte is missing or written twice, and record it."""
        pieces = sorted(self._pieces.pop(name, []))
        at = 0
        for begin, nbytes, _ in pieces:
            if begin != at:
                raise RuntimeError(f"{name}: bytes [{at}, {begin}) were not written, or written twice")
            at += nbytes
        if at != self.layout.slots[name].nbytes:
            raise RuntimeError(f"{name}: {at} of {self.layout.slots[name].nbytes} bytes were written")
        self.journal.done(name, pieces)

    def publish(self, side_files: Mapping[str, bytes], *, force: bool) -> None:
        """Write the index and the small files, flush, and rename the work folder to the output path."""
        missing = [n for n in self.layout.slots if n not in self.journal.finished]
        if missing:
            raise RuntimeError(f"{len(missing)} tensors were not written, {missing[0]!r} among them")
        if len(self.layout.sizes) > 1:
            total = sum(s.nbytes for s in self.layout.slots.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {n: s.shard for n, s in sorted(self.layout.slots.items())},
            }
            (self.work / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name, raw in side_files.items():
            (self.work / name).write_bytes(raw)
        for path in self.work.rglob("*"):
            _sync(path)
        self.close()
        old = self.out.parent / f".{self.out.name}.fastmerge-old"
        if self.out.exists() and force:
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.out, old)
        os.rename(self.work, self.out)
        # The journal goes last: until the rename the folder could still be resumed.
        (self.out / NAME).unlink()
        _sync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self.journal.close()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reserve(fd: int, size: int) -> None:
    if os.fstat(fd).st_size > size:
        os.ftruncate(fd, size)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)  # a file system that can not reserve: the free-space check has to do


def _intact(fd: int, slot: Slot, pieces: list[tuple[int, int, str]]) -> bool:
    return sum(n for _, n, _ in pieces) == slot.nbytes and all(
        xxhash.xxh3_64_hexdigest(os.pread(fd, nbytes, slot.begin + begin)) == checksum
        for begin, nbytes, checksum in pieces
    )


def side_files(folder: Path | None) -> dict[str, Path]:
    """The small files a model needs besides its tensors: configuration and tokenizer."""
    if folder is None:
        return {}
    return {path.name: path for path in _side_paths(folder) if path.is_file()}


def broken_side_links(folder: Path | None) -> list[str]:
    """Names of the small files that are links to nothing, and are therefore not among the side files."""
    if folder is None:
        return []
    return sorted({path.name for path in _side_paths(folder) if path.is_symlink() and not path.exists()})


def _side_paths(folder: Path) -> list[Path]:
    found = [path for pattern in SIDE_FILES for path in sorted(folder.glob(pattern))]
    return [p for p in found if p.suffix not in (".safetensors", ".bin") and not p.name.endswith(".index.json")]

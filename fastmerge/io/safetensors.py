"""The safetensors container: an 8-byte header length, a JSON header, then the tensors' bytes.

Only headers are parsed here; tensor bytes are read and written by position elsewhere. Every check that keeps a bad or
hostile file from being believed is in :func:`read_header`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `begin` is an absolute position in `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n


def _bad(
    file: Path, message: str, remedy: str = "the file is damaged or not safetensors: fetch or save it again"
) -> BadInput:
    return BadInput(message, where=str(file), remedy=remedy)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} appears twice")
        out[key] = value
    return out


def _unreadable(file: Path, error: OSError) -> BadInput:
    if file.is_symlink() and not file.exists():
        why, remedy = f"it is a link to {os.readlink(file)!r}, which does not exist", "mend the link or fetch the file"
    elif file.is_dir():
        why, remedy = "it is a folder", "give a file, or a folder that has the tensors in model.safetensors"
    else:
        why, remedy = str(error.strerror), "check the file's permissions and the disk"
    return BadInput(f"{file.name} can not be read: {why}", where=str(file), remedy=remedy)


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by name in file order, and the file's ``__metadata__``.

    Raises BadInput, naming the file (and tensor), for a truncated or corrupt header, a header or tensor that reaches
    beyond the file, overlapping or misplaced tensors, sizes that do not fit shape and dtype, and duplicate names.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            prefix = f.read(8)
            if len(prefix) < 8:
                raise _bad(file, f"the file has {size} bytes; a safetensors header needs at least 8")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER:
                raise _bad(file, f"the header claims {length} bytes, more than the format's limit of {MAX_HEADER}")
            if 8 + length > size:
                raise _bad(file, f"the header claims {length} bytes, but the file ends after {size}")
            raw = f.read(length)
    except OSError as error:
        raise _unreadable(file, error) from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(file, f"the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(file, "the header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise _bad(file, "__metadata__ is not a JSON object")
    entries: dict[str, Entry] = {}
    data = size - 8 - length
    for name, value in header.items():
        entries[name] = _entry(file, name, value, 8 + length, data)
    _check_layout(file, entries, 8 + length, size)
    return entries, {str(k): str(v) for k, v in metadata.items()}


def _entry(file: Path, name: str, value: Any, origin: int, data: int) -> Entry:
    try:
        code, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _bad(file, f"tensor {name!r}: the header entry lacks dtype, shape or data_offsets") from error
    if not isinstance(code, str) or code not in DTYPES:
        raise _bad(file, f"tensor {name!r} has unknown dtype {code!r}", f"known dtypes: {', '.join(DTYPES)}")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in (*shape, begin, end)):
        raise _bad(file, f"tensor {name!r}: shape {list(shape)} and offsets {[begin, end]} must be whole numbers >= 0")
    entry = Entry(name, DTYPES[code], shape, file, origin + begin, end - begin)
    if begin > end or end > data:
        raise _bad(
            file,
            f"tensor {name!r} reaches to byte {end} of {data} bytes of data: the file is truncated or its offsets are wrong",
        )
    wanted = entry.numel * entry.dtype.itemsize
    if wanted != entry.nbytes:
        raise _bad(
            file,
            f"tensor {name!r} of shape {list(shape)} and dtype {code} needs {wanted} bytes, its offsets give {entry.nbytes}",
        )
    return entry


def _check_layout(file: Path, entries: dict[str, Entry], origin: int, size: int) -> None:
    at, before = origin, ""
    for e in sorted(entries.values(), key=lambda e: (e.begin, e.begin + e.nbytes)):
        if e.begin < at:
            raise _bad(file, f"tensors {before!r} and {e.name!r} overlap")
        if e.begin > at:
            raise _bad(file, f"there are {e.begin - at} unaccounted bytes before tensor {e.name!r}")
        at, before = e.begin + e.nbytes, e.name
    if at != size:
        raise _bad(file, f"there are {size - at} unaccounted bytes after the last tensor")


def build_header(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header bytes (length prefix included, padded to 8) and each tensor's absolute (begin, nbytes), in list order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offsets: dict[str, tuple[int, int]] = {}
    at = 0
    for name, dtype, shape in tensors:
        numel = 1
        for d in shape:
            numel *= d
        nbytes = numel * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        offsets[name] = (at, nbytes)
        at += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    return raw, {name: (len(raw) + begin, nbytes) for name, (begin, nbytes) in offsets.items()}


def became_shorter(file: Path) -> BadInput:
    """For a file that ends before what its header, read earlier, promised."""
    return BadInput(
        "the file became shorter while it was read",
        where=str(file),
        remedy="wait until nothing writes to it, then start again",
    )


def bytes_of(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype, as bytes, without a copy."""
    array: Any = flat.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def pread_into(fd: int, buffer: memoryview, position: int, file: Path) -> None:
    """Fill `buffer` from `position`; raises BadInput when the file is shorter than its header said."""
    done = 0
    while done < len(buffer):
        n = os.preadv(fd, [buffer[done:]], position + done)
        if n == 0:
            raise became_shorter(file)
        done += n

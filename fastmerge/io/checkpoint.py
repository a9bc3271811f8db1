"""Checkpoints: a folder or file of safetensors (or, when allowed, pickles), or a hub id, seen as named tensors.

Opening reads headers only. :class:`Checkpoint` knows every tensor's dtype, shape and place; bytes are read by
:mod:`fastmerge.io.pipeline`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from .safetensors import Entry, read_header

INDEX_FILES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin", "model.pt", "model.pth", "checkpoint.pt")
HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)  # "org/name", or of the hub's first days "gpt2"


@dataclass
class Checkpoint:
    """Named tensors of one model. ``entries`` lie in files; ``resident`` ones in memory (state dicts, pickles)."""

    label: str  # how messages call it: the path or id the user gave
    folder: Path | None
    entries: dict[str, Entry] = field(default_factory=dict)
    resident: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # tied name -> the name that holds its data
    metadata: dict[str, str] = field(default_factory=dict)
    pickles: list[Path] = field(default_factory=list)  # the files that resident tensors came from
    _config: dict[str, Any] | None = None

    def names(self) -> list[str]:
        """Names in checkpoint order (file order, shard by shard), tied aliases excluded."""
        return [*self.entries, *self.resident]

    def __contains__(self, name: str) -> bool:
        name = self.aliases.get(name, name)
        return name in self.entries or name in self.resident

    def dtype(self, name: str) -> torch.dtype:
        return self._get(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._get(name).shape)

    def nbytes(self, name: str) -> int:
        return int(self._get(name).nbytes)

    def _get(self, name: str) -> Entry | Tensor:
        name = self.aliases.get(name, name)
        return self.entries[name] if name in self.entries else self.resident[name]

    def files(self) -> list[Path]:
        """Tensor files in order of first use."""
        return [*dict.fromkeys(e.file for e in self.entries.values()), *self.pickles]

    def shard_of(self, name: str) -> str | None:
        """File name of the shard that holds a tensor, None in memory."""
        name = self.aliases.get(name, name)
        return self.entries[name].file.name if name in self.entries else None

    @property
    def total_bytes(self) -> int:
        return sum(self.nbytes(n) for n in self.names())

    def config(self) -> dict[str, Any]:
        """config.json as a dict (for a module in memory its `config`), empty when there is none."""
        if self._config is None:
            self._config = self._read_config()
        return self._config

    def _read_config(self) -> dict[str, Any]:
        if self.folder is None or not (self.folder / "config.json").is_file():
            return {}
        file = self.folder / "config.json"
        remedy = "fetch or save the checkpoint's config.json again (a folder without one can be merged, too)"
        return read_object(file, remedy)


def listed(models: Any) -> list[Any]:
    """`models` as a list; raises BadInput for one model, which iterating would take apart."""
    one = isinstance(models, (str, os.PathLike, Mapping, Tensor)) or (
        isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList)
    )
    if one or not isinstance(models, Iterable):
        raise BadInput(
            f"models is a {type(models).__name__}, not a list",
            remedy="pass a list of models, each a state_dict, an nn.Module or the path of a checkpoint: [a, b]",
        )
    return list(models)


def from_state_dict(state: Mapping[str, Any], label: str, config: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint over tensors in memory; names that share one storage view become aliases of the first.

    Raises BadInput for what is not a dense tensor with its data here, as a DTensor.

    config: what config.json would say of the model, where that is known.
    """
    out = Checkpoint(label, None, _config=config)
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise BadInput(
                f"{name!r} is a {type(value).__name__}, not a tensor",
                where=label,
                remedy="pass a state_dict of tensors",
            )
        value = value.detach()
        if value.layout != torch.strided:
            raise BadInput(f"tensor {name!r} has layout {value.layout}", where=label, remedy="pass dense tensors")
        if hasattr(value, "to_local") and hasattr(value, "placements"):
            raise BadInput(
                f"tensor {name!r} is a DTensor",
                where=label,
                remedy="gather it first (t.full_tensor()), or give a path; only Frank-Wolfe's base may be sharded",
            )
        held = bool(value.numel() and value.untyped_storage().data_ptr())  # not so for what FSDP freed, or on meta
        if value.numel() and not held and value.device.type != "meta":  # those are told apart by device, later
            raise BadInput(f"tensor {name!r} holds no data", where=label, remedy="load or gather the weights first")
        value = value.resolve_neg()  # torch's lazy negation: a view with its base's address and strides
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if held and key in seen:
            out.aliases[name] = seen[key]
        else:
            seen[key] = name
            out.resident[name] = value
    return out


def _read_json(file: Path, what: str, remedy: str) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise BadInput(f"{what} can not be read: {error.strerror}", where=str(file), remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{what} is not valid JSON ({error})", where=str(file), remedy=remedy) from error


def read_object(file: Path, remedy: str) -> dict[str, Any]:
    """A file that holds one JSON object; raises BadInput, which names it, for any other."""
    loaded = _read_json(file, file.name, remedy)
    if not isinstance(loaded, dict):
        raise BadInput(f"{file.name} is not a JSON object", where=str(file), remedy=remedy)
    return loaded


def _weight_map(index: Path) -> dict[str, str]:
    """Shard by tensor name, as an index says."""
    remedy = "fetch or save the checkpoint again"
    loaded = _read_json(index, "the index", remedy)
    found = loaded.get("weight_map") if isinstance(loaded, dict) else None
    if not isinstance(found, dict) or not all(isinstance(shard, str) for shard in found.values()):
        raise BadInput(
            "the index is not valid: it needs a weight_map, an object with the file name of every tensor",
            where=str(index),
            remedy=remedy,
        )
    return found


def _index_files(folder: Path, index: Path) -> list[Path]:
    """Shards that an index names, checked to lie inside the folder and to exist."""
    out = []
    for shard in dict.fromkeys(_weight_map(index).values()):
        # A hub cache folder holds links to blobs outside it: what must stay inside is the name, before links resolve.
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise BadInput(
                f"the index names {shard!r}, which is outside the checkpoint's folder",
                where=str(index),
                remedy="do not use this checkpoint: an index may only name files beside it",
            )
        try:
            there = (folder / shard).is_file()
        except OSError:  # a name that no file can have
            there = False
        if not there:
            raise BadInput(
                f"the index names shard {shard!r}, which is missing", where=str(index), remedy="fetch the missing file"
            )
        out.append(folder / shard)
    return out


def _check_index(index: Path, holds: Mapping[str, Path]) -> None:
    """Every tensor that the index lists must be in the file that it names."""
    for name, shard in _weight_map(index).items():
        if holds.get(name) != index.parent / shard:
            raise BadInput(
                f"the index lists tensor {name!r}, which is not in {shard}"
                + (f" but in {holds[name].name}" if name in holds else ""),
                where=str(index),
                remedy="fetch the checkpoint again (are index and shards of two saves mixed here?)",
            )


def _open_files(label: str, folder: Path, files: list[Path]) -> Checkpoint:
    out = Checkpoint(label, folder)
    for file in files:
        entries, metadata = read_header(file)
        for name, entry in entries.items():
            if name in out.entries:
                raise _twice(name, out.entries[name].file, file)
            out.entries[name] = entry
        out.metadata.update(metadata)
    return out


def _load_pickle(file: Path) -> Mapping[str, Any]:
    """The state dict of one file. Files of torch before 1.6 are no zip archives and can not be mapped: they are read."""
    try:
        with file.open("rb") as f:
            mapped = f.read(4) == b"PK\x03\x04"
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise BadInput(
            f"the pickle can not be loaded with weights_only ({error})",
            where=str(file),
            remedy="convert it to safetensors with the tool that made it",
        ) from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise BadInput(
            f"the pickle holds a {type(loaded).__name__}, not a state_dict",
            where=str(file),
            remedy="save the model's state_dict() with torch.save, or better with safetensors",
        )
    return loaded


def _open_pickle(label: str, path: Path) -> Checkpoint:
    indexed = path.name.endswith(".index.json")
    files = _index_files(path.parent, path) if indexed else [path]
    state: dict[str, Any] = {}
    holds: dict[str, Path] = {}
    for file in files:
        loaded = _load_pickle(file)
        for name in loaded:
            if name in holds:
                raise _twice(name, holds[name], file)
            holds[name] = file
        state.update(loaded)
    if indexed:
        _check_index(path, holds)
    out = from_state_dict(state, label)
    out.folder, out.pickles = path.parent, files
    return out


def _twice(name: str, first: Path, second: Path) -> BadInput:
    return BadInput(
        f"tensor {name!r} is in two shards, {first.name} and {second.name}",
        where=str(second.parent),
        remedy="remove the stale shard (is a folder of two saves mixed here?)",
    )


def _from_hub(reference: str, allow_pickle: bool) -> Path:
    repo, _, revision = reference.partition("@")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BadInput(
            f"{reference!r} is not a local folder, and hub ids need huggingface_hub",
            remedy="pip install 'fastmerge[hub]', or give the path of a local folder",
        ) from error
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=[*HUB_PATTERNS, *(["*.bin", "*.pt", "*.pth"] if allow_pickle else [])],
            )
        )
    except Exception as error:
        said = " ".join(str(error).split())
        raise BadInput(
            f"{reference!r} is not a local folder and could not be fetched from the hub ({type(error).__name__}: {said})",
            remedy="check the spelling, the connection and the access rights, or give a local folder",
        ) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise BadInput(
            f"there is no folder or file {str(path)!r}: {error.strerror}",
            remedy="check the path and the permissions of the folders on it",
        ) from error


def open_checkpoint(reference: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a folder, a single file or a hub id (``org/name[@revision]``, or ``gpt2``); headers only.

    Raises BadInput naming file and remedy for whatever is missing, damaged, outside its folder, ambiguous, or a pickle
    without `allow_pickle`. Cost: one small read per shard.
    """
    label = str(reference)
    path = Path(reference).expanduser()
    if not _exists(path):
        if path.is_symlink():
            raise BadInput(
                f"the link {label!r} points to {os.readlink(path)!r}, which does not exist",
                remedy="mend the link, or give the path of the checkpoint itself",
            )
        file = "/" not in label and label.endswith(WEIGHT_SUFFIXES)
        if file or not _HUB_ID.fullmatch(label.partition("@")[0]):
            raise BadInput(
                f"there is no folder or file {label!r}",
                remedy="check the path (relative paths start from the current folder)",
            )
        path = _from_hub(label, allow_pickle)
    if path.is_file():
        if path.suffix == ".safetensors":
            return _open_files(label, path.parent, [path])
        if not allow_pickle:
            raise BadInput(
                f"{path.name} is not a safetensors file",
                where=str(path),
                remedy="pickles can run code: pass --allow-pickle if you trust it (it is loaded with weights_only)",
            )
        return _open_pickle(label, path)
    for name in INDEX_FILES:
        if (path / name).is_file():
            out = _open_files(label, path, _index_files(path, path / name))
            _check_index(path / name, {name: entry.file for name, entry in out.entries.items()})
            return out
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return _open_files(label, path, [path / name])
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return _open_files(label, path, found)
    if found:
        raise BadInput(
            f"the folder has {len(found)} safetensors files and no index",
            where=str(path),
            remedy=f"add {INDEX_FILES[0]}, or give the one file to use",
        )
    for name in PICKLES:
        if (path / name).is_file():
            if not allow_pickle:
                raise BadInput(
                    f"the folder holds only a pickle ({name})",
                    where=str(path),
                    remedy="pickles can run code: pass --allow-pickle if you trust it (it is loaded with weights_only)",
                )
            return _open_pickle(label, path / name)
    raise BadInput(
        "the folder holds no checkpoint",
        where=str(path),
        remedy="expected model.safetensors or model.safetensors.index.json",
    )

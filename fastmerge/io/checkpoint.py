"""Checkpoints: a folder or file of safetensors (or, when allowed, pickles), or a hub id, seen as named tensors.

Opening reads headers only. :class:`Checkpoint` knows every tensor's dtype, shape and place; bytes are read by
:mod:`fastmerge.io.pipeline`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .safetensors import Entry, read_header

INDEX_FILES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
SINGLE_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin", "model.pt", "model.pth", "checkpoint.pt")
HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


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
        try:
            loaded = json.loads((self.folder / "config.json").read_text())
        except ValueError as error:
            raise BadInput(
                f"config.json is not valid JSON ({error})", where=str(self.folder / "config.json")
            ) from error
        return loaded if isinstance(loaded, dict) else {}


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


def _index_files(folder: Path, index: Path) -> list[Path]:
    """Shards that an index names, checked to lie inside the folder and to exist."""
    try:
        loaded = json.loads(index.read_text())
        weight_map = loaded["weight_map"]
        shards = list(dict.fromkeys(str(v) for v in weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"the index is not valid ({error!r}); it needs a weight_map", where=str(index)) from error
    out = []
    for shard in shards:
        path = (folder / shard).resolve()
        # A hub cache folder holds links to blobs outside it: what must stay inside is the name, before links resolve.
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise BadInput(
                f"the index names {shard!r}, which is outside the checkpoint's folder",
                where=str(index),
                remedy="do not use this checkpoint: an index may only name files beside it",
            )
        if not path.is_file():
            raise BadInput(
                f"the index names shard {shard!r}, which is missing", where=str(index), remedy="fetch the missing file"
            )
        out.append(folder / shard)
    return out


def _check_index(index: Path, entries: Mapping[str, Entry]) -> None:
    weight_map = json.loads(index.read_text())["weight_map"]
    for name, shard in weight_map.items():
        if name not in entries:
            raise BadInput(
                f"the index lists tensor {name!r}, which is not in {shard}",
                where=str(index),
                remedy="fetch the checkpoint again",
            )


def _open_files(label: str, folder: Path, files: list[Path]) -> Checkpoint:
    out = Checkpoint(label, folder)
    for file in files:
        entries, metadata = read_header(file)
        for name, entry in entries.items():
            if name in out.entries:
                raise BadInput(
                    f"tensor {name!r} is in two shards, {out.entries[name].file.name} and {file.name}",
                    where=str(folder),
                    remedy="remove the stale shard (is a folder of two saves mixed here?)",
                )
            out.entries[name] = entry
        out.metadata.update(metadata)
    return out


def _open_pickle(label: str, path: Path) -> Checkpoint:
    files = _index_files(path.parent, path) if path.name.endswith(".index.json") else [path]
    state: dict[str, Any] = {}
    for file in files:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise BadInput(
                f"the pickle can not be loaded with weights_only ({error})",
                where=str(file),
                remedy="convert it to safetensors with the tool that made it",
            ) from error
        if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
            loaded = loaded["state_dict"]
        if not isinstance(loaded, Mapping):
            raise BadInput(f"the pickle holds a {type(loaded).__name__}, not a state_dict", where=str(file))
        state.update(loaded)
    out = from_state_dict(state, label)
    out.folder, out.pickles = path.parent, files
    return out


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
        raise BadInput(
            f"{reference!r} is not a local folder and could not be fetched from the hub ({type(error).__name__}: {error})",
            remedy="check the spelling, the connection and the access rights, or give a local folder",
        ) from error


def open_checkpoint(reference: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a folder, a single file or a hub id (``org/name[@revision]``); headers only.

    Raises BadInput naming file and remedy for whatever is missing, damaged, outside its folder, ambiguous, or a pickle
    without `allow_pickle`. Cost: one small read per shard.
    """
    label = str(reference)
    path = Path(reference).expanduser()
    if not path.exists():
        if not _HUB_ID.match(label.partition("@")[0]) or label.startswith((".", "/", "~")):
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
            _check_index(path / name, out.entries)
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

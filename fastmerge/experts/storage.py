"""Expert files: the sparse part of one task, in a safetensors file that a dozen lines of numpy can read.

Layout (format "fastmerge-expert", version 1; docs/free.md has a reader without this package). For every parameter NAME
with at least one entry the file holds two tensors:

- ``NAME.values`` [n], in the parameter's own dtype: the kept entries of the delta, in the order of their positions;
- one of, whichever is smallest:

  - ``NAME.gap8`` uint8: for every entry the number of positions skipped since the one before it, written as any number
    of bytes 255 (each: skip 255 and go on) and one byte below 255;
  - ``NAME.gap16`` uint16: the same with 65535;
  - ``NAME.bits`` uint8 [ceil(N / 8)]: bit i % 8 of byte i // 8 (lowest first) is set where position i is kept.

Positions count elements row by row. The metadata holds ``task``, ``density`` and ``xxh3`` (XXH3-64, in hex, of the
bytes of all tensors in the order of their names), and ``tensors``, a JSON object: name -> {shape, mu}.
An entry changes its element by mu · value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BadInput
from ..io.safetensors import build_header, bytes_of

FORMAT, VERSION = "fastmerge-expert", "1"


@dataclass(frozen=True)
class Sparse:
    """The entries of one parameter: ``delta.flat[index] = mu · value``, zero elsewhere."""

    shape: tuple[int, ...]
    index: Tensor  # int64 or int32 [n], strictly increasing
    value: Tensor  # [n], the parameter's dtype
    mu: float = 1.0

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def dense(self) -> Tensor:
        """mu · value in a float32 (float64 for float64 values) tensor of the parameter's shape."""
        wide = torch.float64 if self.value.dtype == torch.float64 else torch.float32
        out = torch.zeros(self.numel, dtype=wide, device="cpu")
        out[self.index.long()] = self.value.to(wide) * self.mu
        return out.view(self.shape)


@dataclass(frozen=True)
class Expert:
    """What one task adds to the merged backbone."""

    task: str
    tensors: dict[str, Sparse]
    density: float = 0.0
    about: dict[str, str] = field(default_factory=dict)  # further text metadata

    @property
    def entries(self) -> int:
        return sum(t.index.numel() for t in self.tensors.values())

    def to(self, device: torch.device | str) -> Expert:
        """The same on `device`, positions as int32 where they fit, ready for expert_scatter."""

        def move(t: Sparse) -> Sparse:
            small = torch.int32 if t.numel < 2**31 else torch.int64
            return Sparse(t.shape, t.index.to(device, small), t.value.to(device), t.mu)

        return Expert(self.task, {k: move(t) for k, t in self.tensors.items()}, self.density, self.about)


def encode(index: npt.NDArray[np.int64], numel: int) -> tuple[str, npt.NDArray[Any]]:
    """The smallest coding of strictly increasing positions: ("gap8" | "gap16" | "bits", array)."""
    skipped = np.diff(index, prepend=-1) - 1
    sizes = {
        "gap8": len(index) + int((skipped // 255).sum()),
        "gap16": 2 * (len(index) + int((skipped // 65535).sum())),
        "bits": -(-numel // 8),
    }
    coding = min(sizes, key=lambda c: sizes[c])
    if coding == "bits":
        mask = np.zeros(numel, np.uint8)
        mask[index] = 1
        return coding, np.packbits(mask, bitorder="little")
    dtype, most = (np.uint8, 255) if coding == "gap8" else (np.uint16, 65535)
    whole = skipped // most
    out = np.full(len(index) + int(whole.sum()), most, dtype)
    out[np.cumsum(whole + 1) - 1] = skipped % most
    return coding, out


def decode(coding: str, data: npt.NDArray[Any], numel: int) -> npt.NDArray[np.int64]:
    """The inverse of encode."""
    if coding == "bits":
        kept: npt.NDArray[np.int64] = np.flatnonzero(np.unpackbits(data, count=numel, bitorder="little"))
        return kept
    most = 255 if coding == "gap8" else 65535
    last = data != most
    positions: npt.NDArray[np.int64] = np.cumsum(data.astype(np.int64) + last) - 1
    kept_positions: npt.NDArray[np.int64] = positions[last]
    return kept_positions


def save(expert: Expert, path: str | Path) -> int:
    """Write an expert file (whole or not at all); returns its size in bytes. The same expert gives the same bytes."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, t in sorted(expert.tensors.items()):
        described[name] = {"shape": list(t.shape), "mu": t.mu}
        if t.index.numel():
            coding, data = encode(t.index.cpu().numpy().astype(np.int64), t.numel)
            tensors[f"{name}.values"] = t.value.detach().cpu().contiguous()
            tensors[f"{name}.{coding}"] = torch.from_numpy(data)
    metadata = {
        **expert.about,
        "format": FORMAT,
        "version": VERSION,
        "task": expert.task,
        "density": repr(expert.density),
        "tensors": json.dumps(described, separators=(",", ":")),
        "xxh3": _checksum(tensors),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    # Wider elements first keeps every tensor aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, _ = build_header([(n, tensors[n].dtype, tuple(tensors[n].shape)) for n in order], metadata)
    with partial.open("wb") as file:
        file.write(header)
        for name in order:
            file.write(bytes_of(tensors[name]))
    partial.replace(path)
    return path.stat().st_size


def load(path: str | Path) -> Expert:
    """Read an expert file. Raises BadInput for a file that is missing, of another kind, damaged or inconsistent."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"can not read the expert: {error}", where=str(path), remedy="check the path and file") from None
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise BadInput(
            f"not a {FORMAT} file of version {VERSION}", where=str(path), remedy="write it with fastmerge.experts.save"
        )
    if _checksum(tensors) != metadata.get("xxh3"):
        raise BadInput("the checksum does not match: the file is damaged", where=str(path), remedy="copy it again")
    try:
        task, density, described = metadata["task"], float(metadata["density"]), json.loads(metadata["tensors"])
        layout = {name: (tuple(int(n) for n in d["shape"]), float(d["mu"])) for name, d in described.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"the expert's metadata lacks what describes it ({type(error).__name__}: {error})",
            where=str(path),
            remedy="write it with fastmerge.experts.save",
        ) from None
    out: dict[str, Sparse] = {}
    for name, (shape, mu) in layout.items():
        coding = next((c for c in ("gap8", "gap16", "bits") if f"{name}.{c}" in tensors), None)
        if coding is None:
            out[name] = Sparse(shape, torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0, device="cpu"), mu)
            continue
        numel = int(np.prod(shape, dtype=np.int64))
        index = decode(coding, tensors[f"{name}.{coding}"].numpy(), numel)
        value = tensors[f"{name}.values"]
        if len(index) != value.numel() or (len(index) and index[-1] >= numel):
            raise BadInput(
                f"tensor {name!r}: {len(index)} positions for {value.numel()} values of {numel} elements",
                where=str(path),
                remedy="write the file again",
            )
        out[name] = Sparse(shape, torch.from_numpy(index), value, mu)
    known = {"format", "version", "task", "density", "tensors", "xxh3"}
    about = {k: v for k, v in metadata.items() if k not in known}
    return Expert(task, out, density, about)


def load_folder(folder: str | Path) -> dict[str, Expert]:
    """The experts ``FOLDER/<task>.safetensors`` by task, in the order of their names."""
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise BadInput("no expert files (*.safetensors)", where=str(folder), remedy="fastmerge free writes them")
    experts = [load(p) for p in paths]
    return {e.task: e for e in experts}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    import xxhash

    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

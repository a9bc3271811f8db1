"""The vertices of Frank-Wolfe: checkpoints, state dicts or LoRA adapters, read piece by piece.

Nothing of a candidate stays in memory between reads: a candidate knows names and shapes, and ``open(name, files)``
gives a source whose ``read(begin, end, buffers, key)`` fills a buffer of the calling thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..io.checkpoint import Checkpoint, from_state_dict, open_checkpoint, read_object
from ..io.files import Files
from ..io.pipeline import Buffers, Source
from .sharding import whole


class Readable(Protocol):
    """One tensor of a candidate, seen flat."""

    def read(self, begin: int, end: int, buffers: Buffers, key: str) -> Tensor:
        """Elements [begin, end); valid until this thread reads into `key` again."""
        ...


class Zeros:
    """The zero vertex: what a candidate that lacks a tensor offers for it."""

    def read(self, begin: int, end: int, buffers: Buffers, key: str) -> Tensor:
        return buffers.get(key, end - begin, torch.float32).zero_()


class Candidate:
    """A model to choose from: a label for messages and tensors by name."""

    deltas = False  # whether tensors are differences from the base (LoRA products) rather than weights

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.label = checkpoint.label

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def names(self) -> list[str]:
        return self.checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.checkpoint.dtype(name)

    def open(self, name: str, files: Files) -> Readable:
        return Source(self.checkpoint, name, files)

    def identity(self) -> str | None:
        """A key under which facts about the files may be cached; None for tensors in memory."""
        if self.checkpoint.resident:
            return None
        parts = []
        for file in self.checkpoint.files():
            stat = file.stat()
            parts.append(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
        return "|".join(parts)


class LoraCandidate(Candidate):
    """A PEFT adapter as the difference it makes: Δ = (α/r)·B·A of each adapted module (α/√r for rsLoRA).

    The product is what the model computes with, so the hull is taken over products; merging A and B apart mixes
    unrelated bases. A module without an adapter is the zero vertex.
    """

    deltas = True

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        super().__init__(checkpoint)
        self.pairs: dict[str, tuple[str, str, float, bool]] = {}
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not rank or alpha is None:
            raise BadInput(
                "adapter_config.json lacks r or lora_alpha",
                where=self.label,
                remedy="give a LoRA adapter that PEFT has saved, or merge another kind into its base first",
            )
        if config.get("use_dora"):
            raise BadInput(
                "a DoRA adapter is not a fixed difference from its base",
                where=self.label,
                remedy="merge it into its base first (merge_and_unload) and give the full checkpoint",
            )
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        try:
            rank, alpha = int(rank), float(alpha)
            ranks, alphas = ({str(k): float(v) for k, v in p.items()} for p in (ranks, alphas))
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise BadInput(
                "adapter_config.json has an r, lora_alpha, rank_pattern or alpha_pattern that is not of numbers",
                where=self.label,
                remedy="give a LoRA adapter that PEFT has saved",
            ) from None
        transposed = bool(config.get("fan_in_fan_out"))
        unknown = []
        for name in checkpoint.names():
            if ".lora_A." not in name and ".lora_embedding_A" not in name:
                if ".lora_B." not in name and ".lora_embedding_B" not in name:
                    unknown.append(name)
                continue
            module = name.partition(".lora_")[0].removeprefix("base_model.model.")
            other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if other not in checkpoint:
                raise BadInput(
                    f"adapter tensor {name!r} has no partner {other!r}",
                    where=self.label,
                    remedy="fetch or save the adapter again: its factors come in pairs",
                )
            a, b = checkpoint.shape(name), checkpoint.shape(other)
            if len(a) != 2 or len(b) != 2 or b[1] != a[0]:
                raise BadInput(
                    f"{name!r} of shape {list(a)} and its partner {other!r} of {list(b)} have no product",
                    where=self.label,
                    remedy="adapters of matrices alone can be candidates: merge this one into its base first",
                )
            r = _pattern(ranks, module, rank)
            scaling = _pattern(alphas, module, alpha) / (r**0.5 if config.get("use_rslora") else r)
            # lora_embedding_A is [r, vocabulary] and the weight [vocabulary, width]: the product is transposed.
            self.pairs[f"{module}.weight"] = (name, other, scaling, transposed or "lora_embedding" in name)
        if unknown:
            raise BadInput(
                f"the adapter holds {len(unknown)} tensors that are not LoRA factors, {unknown[0]!r} first",
                where=self.label,
                remedy="merge it into its base first (merge_and_unload) and give the full checkpoint",
            )
        if not self.pairs:
            raise BadInput(
                "the adapter holds no LoRA factors",
                where=self.label,
                remedy="give an adapter of LoRA matrices (tensors named ….lora_A.weight and ….lora_B.weight)",
            )

    def __contains__(self, name: str) -> bool:
        return name in self.pairs

    def names(self) -> list[str]:
        return list(self.pairs)

    def shape(self, name: str) -> tuple[int, ...]:
        a, b, _, transposed = self.pairs[name]
        rows, columns = self.checkpoint.shape(b)[0], self.checkpoint.shape(a)[1]
        return (columns, rows) if transposed else (rows, columns)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def open(self, name: str, files: Files) -> Readable:
        a, b, scaling, transposed = self.pairs[name]
        return _Product(self._factor(a, files), self._factor(b, files), scaling, transposed)

    def _factor(self, name: str, files: Files) -> Tensor:
        shape = self.checkpoint.shape(name)
        read = super().open(name, files).read(0, shape[0] * shape[1], Buffers(), "")
        return read.float().view(shape)


class _Product:
    """Rows of scaling·B·A, made as they are read: the factors are small, the product is never whole in memory."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float, transposed: bool) -> None:
        self.left, right = (a.T, b.T) if transposed else (b, a)
        self.right = right * scaling
        self.width = self.right.shape[1]

    def read(self, begin: int, end: int, buffers: Buffers, key: str) -> Tensor:
        first, last = begin // self.width, -(-end // self.width)
        rows = (self.left[first:last] @ self.right).reshape(-1)
        return rows[begin - first * self.width : end - first * self.width]


def _pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the value of the first pattern that equals the module's name or its last parts."""
    return next((v for p, v in patterns.items() if module == p or module.endswith("." + p)), default)


def open_candidate(given: Any, index: int, *, allow_pickle: bool = False, factors: bool = False) -> Candidate:
    """A path, hub id, state dict or module as a candidate; a folder with adapter_config.json is a LoRA adapter.

    With `factors` an adapter is its A and B tensors under their own names, to be merged apart.
    """
    if isinstance(given, Candidate):
        return given
    if isinstance(given, nn.Module):
        given = given.state_dict()
    if isinstance(given, Checkpoint):
        return Candidate(given)
    if isinstance(given, Mapping):
        label = f"candidates[{index}]"
        return Candidate(from_state_dict(whole(given, label), label))
    if not isinstance(given, (str, Path)):
        raise BadInput(
            f"candidates[{index}] is a {type(given).__name__}", remedy="give a path, a hub id, a state_dict or a module"
        )
    folder = Path(given).expanduser()
    config = folder / "adapter_config.json"
    if config.is_file():
        settings = read_object(config, "fetch or save the adapter again")
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise BadInput(
                "the adapter has no adapter_model.safetensors",
                where=str(folder),
                remedy="fetch the missing file, or save the adapter again as safetensors",
            )
        checkpoint = open_checkpoint(file)
        checkpoint.label = str(given)
        return Candidate(checkpoint) if factors else LoraCandidate(checkpoint, settings)
    return Candidate(open_checkpoint(given, allow_pickle=allow_pickle))


def check_candidates(
    candidates: Sequence[Candidate], shapes: Mapping[str, tuple[int, ...]], *, missing: str
) -> dict[str, list[int]]:
    """Every problem of every candidate at once; returns the tensors each one lacks (with missing="zero").

    Raises BadInput for shapes that differ, tensors that are not floating point, tensors that are missing (unless
    "zero", or an adapter), candidates that share nothing with the base, and the same files given twice.
    """
    problems: list[BadInput] = []
    lacking: dict[str, list[int]] = {}
    seen: dict[str, str] = {}
    for k, c in enumerate(candidates):
        key = c.identity()
        if key is not None and key in seen:
            problems.append(
                BadInput(f"{c.label!r} and {seen[key]!r} are the same files", remedy="give each candidate once")
            )
        elif key is not None:
            seen[key] = c.label
        own = 0
        absent = []
        for name, shape in shapes.items():
            if name not in c:
                absent.append(name)
                lacking.setdefault(name, []).append(k)
                continue
            own += 1
            if c.shape(name) != shape:
                problems.append(
                    BadInput(
                        f"tensor {name!r} has shape {list(c.shape(name))}, the base {list(shape)}",
                        where=c.label,
                        remedy="leave it out with exclude=, or remove the candidate",
                    )
                )
            elif not c.dtype(name).is_floating_point:
                problems.append(
                    BadInput(
                        f"tensor {name!r} has dtype {c.dtype(name)}, not a float",
                        where=c.label,
                        remedy="leave it out with exclude=, or convert the candidate to floating point",
                    )
                )
        if not own:
            problems.append(
                BadInput("no tensor of the base is in this candidate", where=c.label, remedy="is it the same model?")
            )
        elif absent and missing != "zero" and not c.deltas:
            problems.append(
                BadInput(
                    f"{len(absent)} tensors of the base are missing, {absent[0]!r} first",
                    where=c.label,
                    remedy="leave them out with exclude=, or pass missing='zero' to count them as the zero vertex",
                )
            )
    if problems:
        raise BadInput.collect(problems, "the candidates")
    return lacking

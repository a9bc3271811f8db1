"""Norms of candidates, kept on disk: they never change, so a second run reads each candidate's bytes for dots alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .candidates import Candidate


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/fastmerge/norms``, by default under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastmerge" / "norms"


class NormCache:
    """‖s‖² per candidate and tensor, by the candidate's files (path, size, time of change) and the space."""

    def __init__(self, folder: Path, base: Candidate, space: str) -> None:
        self.folder = folder
        # In the space of deltas a norm depends on the base too.
        self.context = "weights" if space == "weights" else f"deltas from {base.identity()}"
        self.usable = space == "weights" or base.identity() is not None

    def _file(self, candidate: Candidate) -> Path | None:
        identity = candidate.identity()
        if identity is None or not self.usable or candidate.deltas:
            return None
        return self.folder / (hashlib.sha256(f"{self.context}\n{identity}".encode()).hexdigest()[:32] + ".json")

    def load(self, candidates: Sequence[Candidate], names: Sequence[str]) -> Tensor:
        """[K, L] float64, NaN where nothing is known."""
        out = torch.full((len(candidates), len(names)), float("nan"), dtype=torch.float64, device="cpu")
        for k, candidate in enumerate(candidates):
            file = self._file(candidate)
            if file is None:
                continue
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                known: Mapping[str, str] = json.loads(file.read_text())
                for i, name in enumerate(names):
                    if name in known:
                        out[k, i] = float.fromhex(known[name])
        return out

    def save(self, candidates: Sequence[Candidate], names: Sequence[str], squares: Tensor) -> None:
        """Keep what was computed; a cache that can not be written is no error."""
        for k, candidate in enumerate(candidates):
            file = self._file(candidate)
            if file is None:
                continue
            values = {n: v.hex() for n, v in zip(names, squares[k].tolist(), strict=True) if v == v}
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text(json.dumps(values))
                temporary.replace(file)

"""One Frank-Wolfe job: the base, the candidates, and the point θ that moves through their hull.

θ is float32 for the whole run and cast once at the end (steps of bfloat16 stall: a small γ moves most elements by less
than half an ulp). Resident are θ, whatever the gradient callable holds, and one piece per thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _native
from ..errors import BadInput, did_you_mean
from ..gradients import Weights
from ..io.checkpoint import Checkpoint, from_state_dict, open_checkpoint
from ..io.files import Files
from ..io.pipeline import Buffers, opened
from ..io.pipeline import Pool as Workers
from .candidates import Candidate, check_candidates, open_candidate
from .oracle import Pool
from .sharding import Layout, layout_of, whole

State = dict[str, Tensor]


def as_checkpoint(given: Any, what: str, *, allow_pickle: bool = False) -> Checkpoint:
    """A path, hub id, module, state dict or checkpoint as a Checkpoint."""
    if isinstance(given, Checkpoint):
        return given
    if isinstance(given, nn.Module):
        given = given.state_dict()
    if isinstance(given, Mapping):
        return from_state_dict(whole(given, what), what)
    if isinstance(given, (str, Path)):
        return open_checkpoint(given, allow_pickle=allow_pickle)
    raise BadInput(f"{what} is a {type(given).__name__}", remedy="give a path, a hub id, a state_dict or a module")


def _patterns(given: str | Sequence[str] | None, what: str) -> list[re.Pattern[str]]:
    try:
        return [re.compile(p) for p in ([given] if isinstance(given, str) else given or [])]
    except re.error as error:
        raise BadInput(
            f"{what}: {error.pattern!r} is not a regular expression ({error})",
            remedy="escape what is to be taken literally: a point is \\. and a bracket \\[",
        ) from error


class Problem:
    """The merged tensors, where their data is, and θ."""

    def __init__(
        self,
        base: Any,
        candidates: Iterable[Any],
        *,
        select: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        missing: str,
        space: str | None,
        lora: str,
        device: str | torch.device | None,
        shards: Mapping[str, tuple[int, int]] | None,
        group: Any,
        allow_pickle: bool,
        workers: Workers,
        files: Files,
    ) -> None:
        self.files = files
        given = base.state_dict() if isinstance(base, nn.Module) else base
        self.layout: Layout = layout_of(given, shards, group)
        given = self.layout.local(given)
        self.base = Candidate(as_checkpoint(given, "base", allow_pickle=allow_pickle))
        opened = [
            open_candidate(c, k, allow_pickle=allow_pickle, factors=lora == "factors") for k, c in enumerate(candidates)
        ]
        if not opened:
            raise BadInput("there are no candidates", remedy="give at least one model besides the base")
        keep, drop = _patterns(select, "select"), _patterns(exclude, "exclude")
        shapes = self.layout.shapes({n: self.base.shape(n) for n in self.base.names()})
        merged = [
            n
            for n in self.base.names()
            if self.base.dtype(n).is_floating_point
            and (not keep or any(p.search(n) for p in keep))
            and not any(p.search(n) for p in drop)
        ]
        if not merged:
            raise BadInput(
                "select and exclude leave no floating-point tensor of the base to merge",
                where=self.base.label,
                remedy=f"the base's first tensors are {', '.join(self.base.names()[:3])}",
            )
        self.parts = {n: self.layout.part(n, shapes[n]) for n in merged}
        self.layout.check(self.parts)
        adapters = [c for c in opened if c.deltas]
        extra = sorted({n for c in adapters for n in c.names() if n not in shapes})
        if extra:
            raise BadInput(
                f"an adapter changes {extra[0]!r}, which the base does not have{did_you_mean(extra[0], shapes)}",
                where=next(c.label for c in adapters if extra[0] in c),
                remedy="give the base model the adapters were trained on",
            )
        lacking = check_candidates(opened, {n: shapes[n] for n in merged}, missing=missing)
        for c in adapters:  # an adapter's missing modules do not change: the zero difference
            for n in merged:
                if n not in c and opened.index(c) not in lacking.setdefault(n, []):
                    lacking[n].append(opened.index(c))
        self.space = space or ("deltas" if len(adapters) == len(opened) else "weights")
        # Tensors that no adapter touches have a single vertex: nothing to choose.
        if len(adapters) == len(opened):
            touched = {n for c in adapters for n in c.names()}
            merged = [n for n in merged if n in touched]
            self.parts = {n: self.parts[n] for n in merged}
        self.pool = Pool(self.base, opened, self.parts, space=self.space, lacking=lacking, workers=workers, files=files)
        self.adapters = frozenset(k for k, c in enumerate(opened) if c.deltas)
        self.names = merged
        self.device = torch.device(device) if device is not None else self._device()
        self.theta: State = {}
        self.fixed: State = {n: self._whole(n) for n in self.base.names() if n not in self.parts}

    def _device(self) -> torch.device:
        resident = self.base.checkpoint.resident
        return next(iter(resident.values())).device if resident else torch.device("cpu")

    def _whole(self, name: str) -> Tensor:
        resident = self.base.checkpoint.resident
        if name in resident:
            return resident[name]
        flat = self.base.open(name, self.files).read(0, torch.Size(self.base.shape(name)).numel(), Buffers(), "")
        return flat.view(self.base.shape(name)).to(self.device)

    def local_shape(self, name: str) -> tuple[int, ...]:
        return self.layout.local_shape(name, self.parts[name])

    def empty(self) -> State:
        return {n: torch.empty(self.local_shape(n), dtype=torch.float32, device=self.device) for n in self.names}

    def sizes(self) -> dict[str, int]:
        return {n: self.parts[n].numel for n in self.names}

    def state(self, theta: Mapping[str, Tensor] | None = None) -> Weights:
        """What the gradient callable gets: θ in float32, everything else as the base has it, tied names included."""
        theta = self.theta if theta is None else theta
        out = {n: self.layout.wrap(n, theta[n]) if n in theta else self.fixed[n] for n in self.base.names()}
        for alias, name in self.base.checkpoint.aliases.items():
            out[alias] = out[name]
        aliases = {a for a, n in self.base.checkpoint.aliases.items() if n in theta}
        return Weights(out, {*theta, *aliases})

    def take_gradient(self, found: Any, aliases: Mapping[str, str] | None = None) -> State:
        """The callable's answer, checked: local tensors by name in the base's order, unknown or misshapen ones named.

        Of tied tensors that a checkpoint stores twice (`aliases`, from the module) both get the one gradient, so that
        both take the same steps.
        """
        if not isinstance(found, Mapping):
            raise BadInput(
                f"gradient returned a {type(found).__name__}, not a mapping from names to tensors",
                remedy="return {name: gradient} with names of the base's state_dict, as fm.gradient does",
            )
        known = self.base.checkpoint
        out: State = {}
        for given, g in found.items():
            name = str(known.aliases.get(given, given))
            if name in self.fixed or g is None:
                continue
            if name not in self.parts:
                raise BadInput(
                    f"the gradient has {name!r}, which the base does not{did_you_mean(name, self.parts)}",
                    remedy="return names of the base's state_dict",
                )
            g = self.layout.unwrap(name, g)
            if not isinstance(g, Tensor) or not g.is_floating_point():
                raise BadInput(
                    f"the gradient of {name!r} is not a floating-point tensor",
                    remedy="leave the name out, or return None for it, where there is no gradient",
                )
            if g.numel() != self.parts[name].numel:
                raise BadInput(
                    f"the gradient of {name!r} has shape {list(g.shape)}, the weights {list(self.local_shape(name))}",
                    remedy="differentiate with respect to the weights the callable is given",
                )
            out[name] = g
        if not out and not self.layout.sharded:
            raise BadInput(
                "the gradient holds none of the merged tensors",
                where=f"merged: {self.names[0]!r}, ...",
                remedy="does the loss depend on them? are they frozen?",
            )
        for alias, name in (aliases or {}).items():
            if alias in self.parts and name in out:
                out.setdefault(alias, out[name])
        return {n: out[n] for n in self.names if n in out}

    def start_from(self, checkpoint: Candidate | None) -> None:
        """θ = the given checkpoint, or the base."""
        self.theta = self.empty()

        def copy(name: str, begin: int, end: int) -> None:
            part, out = self.parts[name], self.theta[name].view(-1)
            if checkpoint is None:
                out[begin:end] = self.pool.origin(name)(begin, end, "fw0")
            else:
                buffers = self.pool.workers.buffers
                source = checkpoint.open(name, self.files)
                out[begin:end] = source.read(part.begin + begin, part.begin + end, buffers, "fw0")

        self.pool.each(self.sizes(), copy)

    def start_from_sum(self, scale: float) -> None:
        """θ = θ₀ + scale·Σ (θₖ − θ₀): task arithmetic over all candidates, one read of each, one piece at a time."""
        self.theta = self.empty()

        def add(name: str, begin: int, end: int) -> None:
            total: Tensor | None = None
            for k in range(len(self.pool.candidates)):
                delta = self.pool.vertex(name, k, "deltas")(begin, end, "fw0")
                total = delta.float().clone() if total is None else total.add_(delta)
            assert total is not None
            origin = self.pool.origin(name)(begin, end, "origin").float()
            self.theta[name].view(-1)[begin:end] = total.mul_(scale).add_(origin)

        self.pool.each(self.sizes(), add)

    def finish(self, dtype: torch.dtype | None) -> State:
        """The result: θ cast once to the base's dtypes (or `dtype`), the rest as in the base, tied names tied."""
        out: State = {}
        for n in self.base.names():
            if n not in self.theta:
                out[n] = self.fixed[n]
                continue
            if not bool(torch.isfinite(self.theta[n].sum(dtype=torch.float64))):
                raise BadInput(
                    f"the merged tensor {n!r} is not finite",
                    where=self.base.label,
                    remedy="does the base, the start or a candidate hold NaN there? else lower step_size or scale",
                )
            t = self.theta[n].to(dtype or self.base.dtype(n))
            out[n] = self.layout.wrap(n, t)
        for alias, name in self.base.checkpoint.aliases.items():
            out[alias] = out[name]
        return out

    def add_initial(self) -> None:
        """The start becomes the last candidate."""
        state = {n: t.clone() for n, t in self.theta.items()}
        initial = Candidate(from_state_dict(state, "initial"))
        self.pool.add_initial(initial)


@contextmanager
def opened_problem(base: Any, candidates: Iterable[Any], **options: Any) -> Iterator[Problem]:
    """A Problem with its workers and files, which are closed on the way out; nothing inside records gradients."""
    with opened(_native.threads()) as (workers, files), torch.no_grad():
        yield Problem(base, candidates, workers=workers, files=files, **options)


def open_start(problem: Problem, init: Any, merge: Callable[[], None], allow_pickle: bool) -> None:
    """θ as `init` says: "merge", "base", or a checkpoint."""
    if isinstance(init, str) and init == "merge":
        merge()
    elif isinstance(init, str) and init == "base":
        problem.start_from(None)
    else:
        start = Candidate(as_checkpoint(init, "init", allow_pickle=allow_pickle))
        check_candidates([start], {n: p.shape for n, p in problem.parts.items()}, missing="error")
        problem.start_from(start)

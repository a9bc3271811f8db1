"""A merge as planned: its tensors, its method, and the passes over them."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._dispatch import Batch
from .device import Budget, Choice, DeviceStream, Stage, choose, make_budget
from .device.choose import Work
from .errors import BadInput
from .io.checkpoint import Checkpoint
from .io.files import Files
from .io.pipeline import Pool, Stream, chunk_elements
from .methods import Context, Header, Method
from .methods._gram import stream_gram
from .preflight import Planned, check_equal, check_names, plan_tensors, raise_all
from .recipe import Recipe
from .similarity import Cosines

NAN_POLICIES = ("error", "warn", "allow")


class Job:
    """One merge: planned tensors, a method, and the passes over them. Knows nothing of where results go."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        template: Checkpoint,
        base: Checkpoint | None,
        models: Sequence[Checkpoint],
        pool: Pool,
        files: Files,
        *,
        nan: str = "error",
        max_memory: int | None = None,
        ignore_extra: bool = False,
        cosines: bool = False,
        go_on: str = '--resume --nan warn (from Python: fm.run(…, resume=True, nan="warn"))',
    ) -> None:
        """`go_on` is how the caller's user goes on after NaN or Inf was found."""
        if nan not in NAN_POLICIES:
            raise BadInput(
                f"nan must be one of {', '.join(NAN_POLICIES)}, not {nan!r}",
                remedy="error stops at NaN or Inf, warn counts them, allow does not look for them",
            )
        self.recipe, self.method, self.template, self.models = recipe, method, template, list(models)
        self.pool, self.files, self.nan, self._go_on = pool, files, nan, go_on
        self.nonfinite: dict[str, int] = {}
        self._lock = threading.Lock()
        self._unsettled: list[tuple[str, Planned, int, int, Tensor, Tensor]] = []  # see `settle`
        self.cosines = Cosines([str(ref) for ref in recipe.inputs])
        self._all_cosines = cosines  # of tensors for which the method needs no Gram matrix, too
        self.planned: list[Planned] = []
        problems = check_names(template, models, sliced=recipe.compiled.sliced, ignore_extra=ignore_extra)
        if not problems:
            self.planned, problems = plan_tensors(recipe, template, base, models, files)
        if not problems:
            problems = [p for t in self.planned if t.copied and (p := check_equal(t)) is not None]
        raise_all(problems, "the inputs")
        merged = [t for t in self.planned if not t.copied]
        if method.check_pass is not None:
            method.check_pass([_header(t) for t in merged])
        widest = max((s.dtype.itemsize for t in merged for s in [t.reference, *t.models]), default=4)
        try:
            self.chunk = chunk_elements(len(models) + 2, max(widest, 4), pool.workers, max_memory)
        except ValueError as error:
            raise BadInput(
                f"--max-memory {max_memory} is too small: {error}", remedy="allow more memory or use fewer threads"
            ) from error
        self.buffer_bytes = pool.workers * (len(models) + 2) * max(widest, 4) * self.chunk
        self.memory_bytes = self.buffer_bytes + method.held_bytes([_header(t) for t in merged])
        if max_memory is not None and self.memory_bytes > max_memory:
            raise BadInput(
                f"--max-memory {max_memory} is too small: {method.name} needs {self.memory_bytes} bytes for these tensors",
                remedy="allow more memory",
            )
        passes = cosines + max(
            method.reads, 1 + sum(p is not None for p in (method.scan_pass, method.fit_pass, method.files_pass))
        )
        self.input_bytes = sum(t.input_bytes for t in merged)
        # an upper bound: a fit pass reads nothing for parameters that need no fit
        self.read_bytes = passes * self.input_bytes
        self.skipped_bytes = 0  # of what a resumed job need not read again
        self.merged_bytes = sum(t.numel * t.dtype.itemsize for t in merged)
        self.total_bytes = self.read_bytes + self.merged_bytes

    def choose(self, device: str) -> Choice:
        """The devices that `device` stands for, for this job."""
        return choose(device, Work(self.method, self.input_bytes, self.merged_bytes, self.pool.workers))

    def budgets(self, choice: Choice, max_vram: int | None, max_memory: int | None) -> list[Budget]:
        """What each device's stage will allocate. Raises BadInput where it does not fit."""
        merged = [t for t in self.planned if not t.copied]
        inputs = [[*t.models, *([t.base] if t.base else [])] for t in merged]
        wide = any(s.dtype == torch.float64 for sources in inputs for s in sources)
        pinned = None
        if max_memory is not None:
            pinned = (max_memory - self.buffer_bytes) // max(len(choice.devices), 1)
        return [
            make_budget(
                device.name,
                inputs=max((len(sources) for sources in inputs), default=1),
                per_element=max((sum(s.dtype.itemsize for s in sources) for sources in inputs), default=4),
                out=max((t.dtype.itemsize for t in merged), default=4),
                compute=8 if wide else 4,
                largest=max((t.numel for t in merged), default=0),
                workers=max(1, self.pool.workers // len(choice.devices)),
                max_vram=max_vram,
                free=device.free_bytes(),
                max_pinned=pinned,
            )
            for device in choice.devices
        ]

    def stream(
        self,
        tensor: Planned,
        put: Callable[[int, Tensor], None],
        place: Callable[[int, int], Tensor] | None = None,
        *,
        check: bool,
        stage: Stage | None = None,
        pool: Pool | None = None,
        batch: Batch | None = None,
    ) -> Stream:
        """The tensor's chunks; with a stage, merged on its device, and `put` by the time the stage is flushed."""

        def inspect(label: str, offset: int, chunk: Tensor) -> None:
            if _waits(chunk):
                low, high = torch.aminmax(chunk)  # both are NaN where one element is
                with self._lock:
                    self._unsettled.append((label, tensor, offset, chunk.numel(), low, high))
            elif count := _count_nonfinite(chunk):
                self._found_nonfinite(label, tensor.name, offset, chunk, count)

        make: Callable[..., Stream] = Stream
        if stage is not None:
            make = functools.partial(DeviceStream, stage=stage, one_call=self.method.one_call)
        return make(
            tensor.name, tensor.base, tensor.models,
            parameters=tensor.plan.parameters, out_dtype=tensor.dtype, start=tensor.start,
            seed=self.recipe.seed, chunk=self.chunk, pool=pool or self.pool,
            put=put, place=place, inspect=inspect if check and self.nan != "allow" else None, batch=batch,
        )  # fmt: skip

    def settle(self) -> None:
        """Look for NaN and Inf in the tensors on GPUs: all at once and last, so that the host waits once.

        Raises what looking earlier would have; nothing has been written by then, since those merges end in memory.
        """
        unsettled, self._unsettled = self._unsettled, []
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[str, Planned, int, int, Tensor, Tensor]]] = {}
        for item in unsettled:
            kinds.setdefault((item[4].device, item[4].dtype), []).append(item)
        for items in kinds.values():
            ends = torch.stack([end for *_, low, high in items for end in (low, high)])
            for (label, t, offset, count, *_), finite in zip(items, ends.isfinite().view(-1, 2).tolist(), strict=True):
                if all(finite):
                    continue
                source = next(s for s in [t.base, *t.models] if s is not None and s.checkpoint.label == label)
                chunk = source.read(offset, offset + count, self.pool.buffers, "settled")  # not held: it may be a copy
                if found := _count_nonfinite(chunk):
                    self._found_nonfinite(label, t.name, offset, chunk, found)

    def _found_nonfinite(self, label: str, name: str, offset: int, chunk: Tensor, count: int) -> None:
        key = f"{label}: {name}"
        with self._lock:
            self.nonfinite[key] = self.nonfinite.get(key, 0) + count
        if self.nan == "error":
            first = offset + int((~torch.isfinite(chunk.reshape(-1))).nonzero()[0])
            raise BadInput(
                f"tensor {name!r} has NaN or Inf (first at flat index {first})",
                where=label,
                remedy=f"repair the model, or go on with {self._go_on}; NaN then follows IEEE arithmetic",
            )

    def bytes_of(self, t: Planned) -> int:
        """Bytes of a tensor's inputs that its scan and merge read."""
        return t.input_bytes * (1 + (self.method.scan_pass is not None))

    def fit(self) -> Any:
        """The method's pass over all tensors, or None."""
        if self.method.fit_pass is None:
            return None
        streams = (self.stream(t, _nowhere, check=False) for t in self.planned if not t.copied)
        return self.method.fit_pass(streams, self.recipe.seed)

    def plan_files(self) -> dict[str, int]:
        """The files the method writes beside the merged weights, with their sizes as far as headers tell."""
        if self.method.plan_pass is None:
            return {}
        headers = [_header(t) for t in self.planned if not t.copied]
        return self.method.plan_pass(headers, [str(ref) for ref in self.recipe.inputs])

    def write_files(self, folder: Path) -> dict[str, int]:
        """Write them; every tensor is read once more."""
        if self.method.files_pass is None:
            return {}
        streams = (self.stream(t, _nowhere, check=False) for t in self.planned if not t.copied)
        return self.method.files_pass(streams, [str(ref) for ref in self.recipe.inputs], folder)

    def apply(
        self,
        tensor: Planned,
        plan: Any,
        put: Callable[[int, Tensor], None],
        place: Callable[[int, int], Tensor],
        stage: Stage | None = None,
        pool: Pool | None = None,
        batch: Batch | None = None,
    ) -> None:
        """Merge one tensor: scan it if the method asks for it, then apply chunk by chunk or whole.

        place(begin, end) gives the buffer a chunk's result may be written to; put(begin, values) stores it, with a
        stage perhaps only when the stage is flushed. With a batch, what fits one launch with other tensors is done
        when the batch ends; the buffer must then be the result's own place.
        """
        held = batch if self.method.one_call else None
        stream = self.stream(tensor, put, place, check=True, stage=stage, pool=pool, batch=held)
        method, parameters = self.method, tensor.plan.parameters
        context = Context(
            name=tensor.name,
            shape=tensor.reference.shape,
            start=tensor.start,
            seed=self.recipe.seed,
            dtype=tensor.dtype,
            plan=plan,
        )
        if stream.numel == 0:
            return
        if method.scan_pass is not None:
            context.state = method.scan_pass(stream, plan)
        if method.grain == "stream":
            method.function(stream, context=context, **method.arguments(parameters))
        elif method.grain == "element":

            def visit(offset: int, base: Tensor | None, models: list[Tensor], out: Tensor | None) -> Tensor:
                here = copy.copy(context)
                here.offset, here.out = offset, out
                return method(base, models, here, parameters)

            stream.merge_each(visit)
        else:
            base, models = stream.whole()
            stream.emit(method(base, models, context, parameters))
        if self._all_cosines and stream.gram is None:
            stream_gram(stream, deltas=stream.has_base)
        for source in [*tensor.models, *([tensor.base] if tensor.base is not None else [])]:
            source.release()
        if stream.gram is not None:
            self.cosines.add(tensor.name, tensor.plan.models, **stream.gram)


def _header(t: Planned) -> Header:
    config = t.models[0].checkpoint.config()
    return Header(t.name, tuple(t.reference.shape), t.dtype, t.plan.parameters, t.plan.models, config)


def _nowhere(offset: int, values: Tensor) -> None:
    raise RuntimeError("a fit or scan pass can not emit results")


def _waits(chunk: Tensor) -> bool:
    """Whether the host would have to wait for a look at the chunk."""
    return chunk.device.type != "cpu"


def _count_nonfinite(chunk: Tensor) -> int:
    if chunk.device.type == "cpu" and chunk.is_contiguous() and _native.why_not() is None:
        return int(_native.lib().count_nonfinite(chunk.data_ptr(), _native.DTYPES[chunk.dtype], chunk.numel()))
    return int((~torch.isfinite(chunk)).sum())

"""Streams of tensor chunks: a pool of workers, each of which reads, computes and writes its own chunk.

While one worker waits for the disk another computes, so reading, computing and writing overlap without queues; a chunk
is read into the worker's own buffers and merged while it is still in cache; memory is workers x (inputs + 1) x chunk,
whatever the size of the tensors. Results do not depend on the chunk size or the number of workers: methods of grain
"element" are elementwise given their plan and state, and sums go by fixed blocks of :data:`BLOCK` elements.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import _native, ops
from .._dispatch import Batch
from .checkpoint import Checkpoint
from .files import Files, Piece

BLOCK = 65_536  # elements; chunks begin at multiples of it, and block sums are aligned to it
CHUNK = 8 * BLOCK  # elements of one stream per worker, before memory limits

Visit = Callable[[int, Tensor | None, list[Tensor]], None]
Inspect = Callable[[str, int, Tensor], None]  # (model, offset, chunk)
Merge = Callable[[int, Tensor | None, list[Tensor], Tensor | None], Tensor]  # (offset, base, models, out) -> values


class Buffers:
    """Named, growing, page-aligned work memory of one thread, backed by huge pages where the kernel grants them."""

    def __init__(self) -> None:
        self._maps: dict[str, Tensor] = {}

    def get(self, key: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor over the buffer called `key`; its contents are whatever the last user left."""
        nbytes = max(numel * dtype.itemsize, 1)
        held = self._maps.get(key)
        if held is None or held.numel() < nbytes:
            self._maps.pop(key, None)
            size = -(-nbytes // (1 << 21)) * (1 << 21) if nbytes >= 1 << 21 else nbytes
            # Private: shared anonymous memory is a file to the kernel, and gets no huge pages.
            flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
            region = mmap.mmap(-1, size, **flags)
            if hasattr(mmap, "MADV_HUGEPAGE") and size >= 1 << 21:
                region.madvise(mmap.MADV_HUGEPAGE)
            held = torch.frombuffer(region, dtype=torch.uint8)
            self._maps[key] = held
        return held[: numel * dtype.itemsize].view(dtype)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() for t in self._maps.values())


class Pool:
    """Workers with their buffers. The calling thread is the first worker; a pool of one starts no thread."""

    def __init__(self, workers: int, *, in_memory: bool = False) -> None:
        self.workers = max(1, workers)
        self.in_memory = in_memory  # tensors come whole, and kernels use all threads on them
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(self.workers - 1, "fastmerge") if self.workers > 1 else None

    @property
    def buffers(self) -> Buffers:
        """The calling thread's buffers."""
        if not hasattr(self._local, "buffers"):
            self._local.buffers = Buffers()
        buffers: Buffers = self._local.buffers
        return buffers

    def each(self, count: int, task: Callable[[int], None]) -> None:
        """task(i) for i in range(count), in parallel; the first exception stops the rest and is raised."""
        if self._executor is None or count <= 1:
            # A pool of one was asked for one thread; a single task of a larger pool may use all of them.
            with _native.limit_threads(1) if self.workers == 1 and not self.in_memory else contextlib.nullcontext():
                for i in range(count):
                    task(i)
            return
        take = itertools.count()  # next() is atomic under the interpreter lock
        stop = threading.Event()
        errors: list[BaseException] = []

        def run() -> None:
            with _native.limit_threads(1):
                try:
                    while not stop.is_set() and (i := next(take)) < count:
                        task(i)
                except BaseException as error:
                    errors.append(error)
                    stop.set()

        others = [
            self._executor.submit(contextvars.copy_context().run, run) for _ in range(min(self.workers, count) - 1)
        ]
        try:
            run()
            for future in others:
                future.result()
        finally:
            stop.set()
            for future in others:
                future.exception()
        if errors:
            raise errors[0]

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


class Source:
    """One tensor of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, name: str, files: Files) -> None:
        self.checkpoint, self.name, self.files = checkpoint, name, files
        held = checkpoint.aliases.get(name, name)
        self.entry = checkpoint.entries.get(held)
        self.tensor = None if self.entry is not None else checkpoint.resident[held]
        self._flat: Tensor | None = None
        self.dtype, self.shape = checkpoint.dtype(name), checkpoint.shape(name)
        self.nbytes = checkpoint.nbytes(name)

    @property
    def flat(self) -> Tensor:
        """A tensor in memory, flattened: a view, or (strided otherwise) a copy made once and kept until `release`."""
        if self._flat is None:
            assert self.tensor is not None
            self._flat = self.tensor.detach().reshape(-1)
        return self._flat

    def release(self) -> None:
        """Forget the copy: the tensor is merged."""
        self._flat = None

    def read(self, begin: int, end: int, buffers: Buffers, key: str) -> Tensor:
        if self.tensor is not None:
            return self.flat[begin:end]
        into = buffers.get(key, end - begin, self.dtype)
        read_into([self], begin, end, [into])
        return into

    def spans(self, starts: Sequence[int], length: int, buffers: Buffers, key: str) -> Tensor:
        """`length` elements from each of `starts`, one span after the other."""
        into = buffers.get(key, len(starts) * length, self.dtype)
        if self.entry is not None:
            self.files.load_spans(self.entry, starts, length, into)
        else:
            torch.cat([self.flat[start : start + length] for start in starts], out=into)
        return into


def read_into(
    sources: Sequence[Source], begin: int, end: int, into: Sequence[Tensor], inspect: Inspect | None = None
) -> None:
    """Elements [begin, end) of every source into flat buffers of their dtypes; what is in files, in one go.

    `inspect` is shown what has NaN or Inf, and what was not looked at on the way.
    """
    pieces: list[Piece] = []
    for source, to in zip(sources, into, strict=True):
        if source.entry is not None:
            pieces.append((source.entry, begin, end, to))
        else:
            to.copy_(source.flat[begin:end])
    counts = sources[0].files.load(pieces, count=inspect is not None) if pieces else None
    found = iter(counts or [])
    for source, to in zip(sources, into, strict=True):
        if inspect is not None and (source.entry is None or counts is None or next(found)):
            inspect(source.checkpoint.label, begin, to)


class Stream:
    """One parameter of the base and all models (a ``methods.TensorStream``); output goes to `put`."""

    def __init__(
        self,
        name: str,
        base: Source | None,
        models: Sequence[Source],
        *,
        parameters: Mapping[str, Any],
        out_dtype: torch.dtype,
        start: int,
        seed: int,
        chunk: int,
        pool: Pool,
        put: Callable[[int, Tensor], None],
        place: Callable[[int, int], Tensor] | None = None,
        inspect: Inspect | None = None,
        batch: Batch | None = None,
    ) -> None:
        self._batch = batch
        self.name, self.base, self.models = name, base, list(models)
        self.shape = models[0].shape
        self.numel = 1
        for d in self.shape:
            self.numel *= d
        self.parameters, self.out_dtype, self.start, self.seed = parameters, out_dtype, start, seed
        self.count, self.has_base = len(models), base is not None
        self.config: Mapping[str, Any] = models[0].checkpoint.config()
        self.pool, self._chunk, self._put, self._place, self._inspect = pool, chunk, put, place, inspect
        self._inspected = False
        self.gram: dict[str, Any] | None = None  # keep_gram's arguments
        inputs = ([base] if base else []) + self.models
        self.compute = torch.float64 if any(s.dtype == torch.float64 for s in inputs) else torch.float32
        self.resident = all(s.tensor is not None for s in inputs)

    def _read(self, begin: int, end: int, inspect: Inspect | None = None) -> tuple[Tensor | None, list[Tensor]]:
        buffers, values, filed = self.pool.buffers, [], []
        for key, source in self._inputs():
            if source.entry is None:
                values.append(source.read(begin, end, buffers, key))
                if inspect is not None:
                    inspect(source.checkpoint.label, begin, values[-1])
            else:
                values.append(buffers.get(key, end - begin, source.dtype))
                filed.append((source, values[-1]))
        read_into([s for s, _ in filed], begin, end, [into for _, into in filed], inspect)
        return (None, values) if self.base is None else (values[0], values[1:])

    def _inputs(self) -> list[tuple[str, Source]]:
        """The inputs, the base first, with the names of their buffers."""
        models = [(f"model{i}", m) for i, m in enumerate(self.models)]
        return models if self.base is None else [("base", self.base), *models]

    def read(self, begin: int, end: int) -> tuple[Tensor | None, list[Tensor]]:
        """Elements [begin, end), flat, valid until the next read on this thread."""
        return self._read(begin, end)

    def read_spans(self, starts: Sequence[int], length: int) -> tuple[Tensor | None, list[Tensor]]:
        """`length` elements from each of `starts`, one span after the other, valid until the next read on this thread."""
        buffers = self.pool.buffers
        values = [source.spans(starts, length, buffers, key) for key, source in self._inputs()]
        return (None, values) if self.base is None else (values[0], values[1:])

    def chunks(self, align: int = 1, block: int = BLOCK) -> Iterator[tuple[int, int]]:
        """(begin, end) of the pieces; a tensor in memory is one piece, whose kernels use all threads."""
        step = max(self.numel, 1)
        if not self.resident:
            unit = math.lcm(block, max(align, 1))
            step = min(step, -(-self._chunk // unit) * unit)
        for begin in range(0, self.numel, step):
            yield begin, min(begin + step, self.numel)

    def for_each(self, visit: Visit, align: int = 1, block: int = BLOCK) -> None:
        """visit(offset, base, models) over chunks that cover the tensor, from several threads at once.

        Chunks begin at multiples of `block` elements and of `align` (rows, say).
        """
        pieces = list(self.chunks(align, block))
        inspect = None if self._inspected else self._inspect

        def task(i: int) -> None:
            base, models = self._read(*pieces[i], inspect)
            visit(pieces[i][0], base, models)

        self.pool.each(len(pieces), task)
        self._inspected = True

    def merge_each(self, visit: Merge, align: int = 1) -> None:
        """Store visit(offset, base, models, out) for every chunk: chunks as `for_each` gives them.

        `out`, if any, is a flat buffer of the output's dtype that the values may be written to.
        """

        def task(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
            out = self.place(offset, offset + models[0].numel())
            # What waits in a batch reads its inputs later: those in memory stay, those in a worker's buffers do not.
            with self._batch.deferring() if self._batch and self.resident else contextlib.nullcontext():
                values = visit(offset, base, models, out)
            self.put(offset, values.reshape(-1))

        self.for_each(task, align)

    def in_one_call(self, runs: Callable[[Tensor | None, list[Tensor]], bool]) -> bool:
        """Whether `merge_each` gives the whole tensor in one call: in memory, where ``runs(base, models)``."""
        return self.resident and runs(*self.whole())

    def collects(self, key: str, dtype: torch.dtype = torch.float32) -> bool:
        """Whether `collect` keeps the tensor on a device; if not, a method may rather pass over it twice."""
        return False

    def collect(
        self,
        key: str,
        visit: Merge,
        dtype: torch.dtype = torch.float32,
        then: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """visit(offset, base, models, out) of every chunk, in one tensor of this one's shape, which `then` may change.

        `out` is the chunk's place in it. Lives until the next call with this key.
        """
        whole = self.buffer(key, dtype)
        flat = whole.view(-1)

        def task(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
            here = flat[offset : offset + models[0].numel()]
            values = visit(offset, base, models, here).reshape(-1)
            if values.data_ptr() != here.data_ptr():
                here.copy_(values)

        self.for_each(task)
        if then is not None:
            then(whole)
        return whole

    def _origin(self) -> Source:
        if self.base is None:
            raise ValueError(f"{self.name}: there is no base to add")
        return self.base

    def whole(self) -> tuple[Tensor | None, list[Tensor]]:
        """All elements in the tensor's shape; from files, into buffers that the next tensor reuses."""
        inspect = None if self._inspected else self._inspect

        def read(source: Source, key: str) -> Tensor:
            if source.tensor is not None:
                if inspect is not None:
                    inspect(source.checkpoint.label, 0, source.tensor)
                return source.tensor
            flat = self.pool.buffers.get("whole " + key, self.numel, source.dtype)
            pieces = list(self.chunks())

            def task(i: int) -> None:
                read_into([source], *pieces[i], [flat[slice(*pieces[i])]], inspect)

            self.pool.each(len(pieces), task)
            return flat.view(self.shape)

        base = None if self.base is None else read(self.base, "base")
        models = [read(m, f"model{i}") for i, m in enumerate(self.models)]
        self._inspected = True
        return base, models

    def buffer(self, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Work memory of the tensor's shape, reused from tensor to tensor; contents undefined."""
        held = self.models[0].tensor
        if held is not None and held.device.type != "cpu":
            return torch.empty(self.shape, dtype=dtype, device=held.device)
        return self.pool.buffers.get("work " + key, self.numel, dtype).view(self.shape)

    def scratch(self, key: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Flat work memory on the CPU, reused from tensor to tensor; contents undefined."""
        return self.pool.buffers.get("scratch " + key, numel, dtype)

    def place(self, begin: int, end: int) -> Tensor | None:
        """Where elements [begin, end) of the result may be written before they are put, if anywhere."""
        return None if self._place is None else self._place(begin, end)

    def put(self, offset: int, values: Tensor) -> None:
        """Store a flat chunk of the result, cast to the output dtype."""
        self._put(offset, values if values.dtype == self.out_dtype else values.to(self.out_dtype))

    def keep_gram(self, gram: list[list[float]], *, deltas: bool, base_first: bool) -> None:
        """Inner products of the deltas, or of the models with the base before them or without it: for the report."""
        self.gram = {"gram": gram, "deltas": deltas, "base_first": base_first}

    def emit(self, result: Tensor, *, add_base: bool = False) -> None:
        """Store the whole result; with add_base, base + result in float32 (float64 if one of them is), rounded once."""
        if tuple(result.shape) != tuple(self.shape):
            raise ValueError(f"{self.name}: the method returned shape {tuple(result.shape)}, expected {self.shape}")
        flat = result.reshape(-1)
        if not add_base:
            pieces = list(self.chunks())
            self.pool.each(len(pieces), lambda i: self.put(pieces[i][0], flat[slice(*pieces[i])]))
            return
        source = self._origin()
        pieces = list(self.chunks())

        def task(i: int) -> None:
            begin, end = pieces[i]
            base = source.read(begin, end, self.pool.buffers, "base")
            here = [base, flat[begin:end]]
            self.put(begin, ops.weighted_sum(None, here, 1.0, dtype=self.out_dtype, out=self.place(begin, end)))

        self.pool.each(len(pieces), task)


def chunk_elements(count: int, widest: int, workers: int, max_memory: int | None) -> int:
    """Elements per chunk for `count` streams of at most `widest` bytes an element: a multiple of BLOCK.

    Raises ValueError when even one block per worker exceeds max_memory (bytes).
    """
    chunk = CHUNK
    while chunk > BLOCK and (
        count * widest * chunk > 16 << 20 or (max_memory and workers * count * widest * chunk > max_memory)
    ):
        chunk //= 2
    if max_memory and workers * count * widest * chunk > max_memory:
        raise ValueError(f"{workers} workers need {workers * count * widest * chunk} bytes of buffers")
    return chunk


@contextmanager
def opened(workers: int, *, in_memory: bool = False) -> Iterator[tuple[Pool, Files]]:
    """A pool and a file table, closed on the way out; meanwhile kernels use at most `workers` threads between chunks, too."""
    pool, files = Pool(workers, in_memory=in_memory), Files()
    try:
        with contextlib.nullcontext() if in_memory else _native.limit_threads(workers):
            yield pool, files
    finally:
        pool.close()
        files.close()

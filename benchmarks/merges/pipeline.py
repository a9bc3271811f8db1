"""End to end against what the machine can do with the same bytes: read, compute and write alone, in the same run.

python -m fastmerge.benchmarks.merges.pipeline FOLDER [METHOD ...] [--threads N] [--rounds N] [--layers N] [--hidden N]
    [--vocabulary N] [--no-cold]

FOLDER holds a base and four models (checkpoints.py makes them, 1.01 GB each without options). Per method and round, in turn:

    read     every byte that the merge reads, as often as it reads it, by pread in blocks of 1 MiB
    compute  the merge's own passes over inputs in memory (the same piece of each, over and over): nothing is read or written
    write    the output's bytes into reserved files in FOLDER, in blocks of 512 KiB, and fsync, as the engine does
    merge    `fm.run`, from opening the headers to the published folder

all with the same number of threads. An overlapped pipeline takes the largest of the three plus what it can not overlap;
`ratio` is merge / max(read, compute, write). Warm: the inputs are in the page cache. Cold: the kernel was told to drop them
(posix_fadvise) before each read and merge, which needs a file system on a disk; where a merge reads its inputs twice, the
second time they are in the page cache again, in `read` too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmerge as fm
from fastmerge.io.checkpoint import open_checkpoint
from fastmerge.io.files import Files
from fastmerge.io.pipeline import CHUNK, Buffers, Pool, Source
from fastmerge.job import Job
from fastmerge.recipe import Recipe

from .checkpoints import family
from .peers import METHODS

READ_BLOCK, WRITE_BLOCK = 1 << 20, 512 << 10  # bytes
PATTERN = CHUNK  # elements of each input that stand for all of them when nothing is read


def still(job: Job) -> None:
    """Make every input of the job its largest tensor's first elements over and over, in memory, at no cost of reading."""
    largest = max((t for t in job.planned if not t.copied), key=lambda t: t.numel)
    buffers = Buffers()
    held = {}
    for source in [*largest.models, *([largest.base] if largest.base is not None else [])]:
        piece = source.read(0, min(PATTERN, largest.numel), buffers, "piece").clone()
        held[source.checkpoint.label] = piece.repeat(1 + -(-(PATTERN + CHUNK) // piece.numel()))
    for t in job.planned:
        for source in [*t.models, *([t.base] if t.base is not None else [])]:
            _replace(source, held[source.checkpoint.label])


def _replace(source: Source, pattern: Tensor) -> None:
    def read(begin: int, end: int, *_: object) -> Tensor:
        start = begin % PATTERN
        return pattern[start : start + end - begin]

    def spans(starts: Sequence[int], length: int, *_: object) -> Tensor:
        return torch.cat([read(start, start + length) for start in starts])

    source.entry = None  # nothing to load
    source.read, source.spans = read, spans  # type: ignore[method-assign]


def files_of(folders: Iterable[Path]) -> list[Path]:
    """The weights' files."""
    return sorted(f for folder in folders for f in folder.glob("*.safetensors"))


def blocks(sizes: dict[Path, int], step: int) -> list[tuple[Path, int, int]]:
    """(file, position, bytes) of every block."""
    return [(f, at, min(step, size - at)) for f, size in sizes.items() for at in range(0, size, step)]


def in_turn(threads: int, count: int, task: Callable[[int], None]) -> None:
    """task(i) for i < count, the next one to whoever is free."""
    lock, left = threading.Lock(), iter(range(count))

    def work(_: int) -> None:
        while True:
            with lock:
                i = next(left, None)
            if i is None:
                return
            task(i)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def read(files: Sequence[Path], threads: int) -> None:
    """Every byte of the files once."""
    pieces = blocks({f: f.stat().st_size for f in files}, READ_BLOCK)
    fds = {f: os.open(f, os.O_RDONLY) for f in files}
    local = threading.local()

    def task(i: int) -> None:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(READ_BLOCK))
        file, at, n = pieces[i]
        done = 0
        while done < n:
            done += os.preadv(fds[file], [local.buffer[done:n]], at + done)

    in_turn(threads, len(pieces), task)
    for fd in fds.values():
        os.close(fd)


def write(folder: Path, sizes: Sequence[int], threads: int) -> None:
    """Files of these sizes, reserved, written in blocks and flushed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    paths = {folder / f"{i}": size for i, size in enumerate(sizes)}
    fds = {p: os.open(p, os.O_RDWR | os.O_CREAT) for p in paths}
    for p, size in paths.items():
        os.posix_fallocate(fds[p], 0, size)
    pieces = blocks(paths, WRITE_BLOCK)
    data = os.urandom(WRITE_BLOCK)

    def task(i: int) -> None:
        path, at, n = pieces[i]
        os.pwrite(fds[path], memoryview(data)[:n], at)

    in_turn(threads, len(pieces), task)
    for fd in fds.values():
        os.fsync(fd)
        os.close(fd)
    shutil.rmtree(folder)


def compute(recipe: Recipe, folders: Sequence[Path], threads: int) -> None:
    """The passes over all tensors, without reading or writing."""
    method: Any = recipe.method
    checkpoints = [open_checkpoint(str(f)) for f in folders]
    template, models = checkpoints[0], checkpoints[1:] if recipe.base_model is not None else checkpoints
    base = template if recipe.base_model is not None else None
    pool, files = Pool(threads), Files()
    try:
        with torch.no_grad():
            job = Job(recipe, method, template, base, models, pool, files)
            still(job)
            plan = job.fit()
            for t in (t for t in job.planned if not t.copied):

                def place(begin: int, end: int, dtype: torch.dtype = t.dtype) -> Tensor:
                    return pool.buffers.get("out", end - begin, dtype)

                job.apply(t, plan, lambda offset, values: None, place)
    finally:
        pool.close()
        files.close()


def forget(files: Iterable[Path]) -> None:
    """Ask the kernel to drop the files from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(folder: Path, method: str, threads: int, rounds: int, cold: bool) -> dict[str, float]:
    """Medians in seconds, and `passes`: how often the inputs are read."""
    scenario = METHODS[method]
    models = [folder / f"model{i}" for i in range(1, 1 + scenario.models)]
    base = folder / "base" if scenario.base else None
    recipe = Recipe.from_call(
        method, None if base is None else str(base), [str(m) for m in models], scenario.parameters
    )
    inputs = [*([] if base is None else [base]), *models]
    files, out = files_of(inputs), folder / f"pipeline-{method}"
    sizes = [f.stat().st_size for f in files_of(inputs[:1])]
    total = sum(f.stat().st_size for f in files)
    passes = 1
    taken: dict[str, list[float]] = {"read": [], "compute": [], "write": [], "merge": []}

    def merge() -> None:
        nonlocal passes
        report = fm.run(recipe, out, threads=threads, device="cpu")
        passes = max(1, round(report.bytes_read / total))

    def again(times: int) -> None:
        for _ in range(times):
            read(files, threads)

    shutil.rmtree(out, ignore_errors=True)
    again(1)
    merge()  # warms up; says how often the inputs are read
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        if cold:
            forget(files)
        taken["read"].append(seconds(lambda: again(passes)))
        taken["compute"].append(seconds(lambda: compute(recipe, inputs, threads)))
        taken["write"].append(seconds(lambda: write(folder / "pipeline-raw", sizes, threads)))
        if cold:
            forget(files)
        taken["merge"].append(seconds(merge))
    shutil.rmtree(out, ignore_errors=True)
    return {name: statistics.median(t) for name, t in taken.items()} | {"passes": passes, "bytes": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", default=["linear", "ties"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--no-cold", action="store_true")
    given = parser.parse_intermixed_args()
    folder = given.folder.absolute()
    family(folder, layers=given.layers, hidden=given.hidden, vocabulary=given.vocabulary)
    print(f"{given.threads} threads, medians of {given.rounds}, seconds; load {os.getloadavg()[0]:.1f}")
    print(
        f"{'method':<17}{'cache':<6}{'reads':>6}{'read':>8}{'GB/s':>7}{'compute':>9}{'write':>8}{'merge':>8}{'ratio':>7}  bound"
    )
    for method in given.methods:
        for cold in (False,) if given.no_cold else (False, True):
            m = measure(folder, method, given.threads, given.rounds, cold)
            terms = {name: m[name] for name in ("read", "compute", "write")}
            bound = max(terms, key=lambda name: terms[name])
            print(
                f"{method:<17}{'cold' if cold else 'warm':<6}{m['passes']:>6.0f}{m['read']:>8.2f}"
                f"{m['passes'] * m['bytes'] / m['read'] / 1e9:>7.1f}{m['compute']:>9.2f}{m['write']:>8.2f}{m['merge']:>8.2f}"
                f"{m['merge'] / terms[bound]:>7.2f}  {bound}",
                flush=True,
            )


if __name__ == "__main__":
    main()

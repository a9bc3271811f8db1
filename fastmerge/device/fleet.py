"""One or several devices at work on the tensors of a job."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..io.pipeline import Pool
from .stage import Stage

T = TypeVar("T")


def assign(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Indices for each worker, in order: the largest first, each to the worker with least; ties to the first."""
    loads = [0] * workers
    shares: list[list[int]] = [[] for _ in range(workers)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        to = min(range(workers), key=lambda w: (loads[w], w))
        loads[to] += sizes[i]
        shares[to].append(i)
    return [sorted(share) for share in shares]


class Fleet:
    """Stages that share out tensors; every stage has its own workers for reading and storing."""

    def __init__(self, stages: Sequence[Stage], pool: Pool) -> None:
        self.stages, self.pool = list(stages), pool

    def each(self, tensors: Sequence[T], size: Callable[[T], int], task: Callable[[T, Stage, Pool], None]) -> None:
        """task(tensor, stage, pool) for every tensor, then every result stored; the first error stops all.

        Small tensors come last, so that the slot that they fill together is not held while others pass.
        """
        if len(self.stages) == 1:
            small = self.stages[0].small
            ordered = sorted(tensors, key=lambda t: size(t) <= small)
            self._share(ordered, self.stages[0], self.pool, task, threading.Event())
            return
        shares = assign([size(t) for t in tensors], len(self.stages))
        stop = threading.Event()
        workers = max(1, self.pool.workers // len(self.stages))

        def drive(stage: Stage, share: list[int]) -> None:
            pool = Pool(workers, in_memory=self.pool.in_memory)
            try:
                ordered = sorted((tensors[i] for i in share), key=lambda t: size(t) <= stage.small)
                self._share(ordered, stage, pool, task, stop)
            finally:
                pool.close()

        with ThreadPoolExecutor(len(self.stages), "fastmerge-device") as threads:
            futures = [
                threads.submit(contextvars.copy_context().run, drive, stage, share)
                for stage, share in zip(self.stages, shares, strict=True)
            ]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()

    @staticmethod
    def _share(
        tensors: Sequence[T],
        stage: Stage,
        pool: Pool,
        task: Callable[[T, Stage, Pool], None],
        stop: threading.Event,
    ) -> None:
        try:
            for tensor in tensors:
                if stop.is_set():
                    break
                task(tensor, stage, pool)
            stage.flush()
        except BaseException:
            stop.set()
            with contextlib.suppress(Exception):  # a device that failed fails again: the first error is the one to show
                stage.abandon()
            raise

"""One parameter of all models, merged on a device chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._dispatch import Batch
from ..io.pipeline import Merge, Source, Stream, read_into
from .stage import TRANSFORM, Stage


class DeviceStream(Stream):
    """A :class:`Stream` whose `merge_each`, `collect` and `emit` run on a stage; passes that only look run on the CPU.

    `merge_each` and `emit` return when the last chunk is queued, not when it is stored: see :meth:`Stage.flush`.
    """

    def __init__(self, *arguments: Any, stage: Stage, one_call: bool, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self.stage, self._one_call = stage, one_call
        self._sources: list[Source] = ([] if self.base is None else [self.base]) + self.models
        self._whole: Tensor | None = None  # what collect gave, on the device

    def _leave_out(self, nbytes: int) -> None:
        self.stage.left_out[self.name] = nbytes

    def merge_each(self, visit: Merge, align: int = 1) -> None:
        """See :class:`Stream`. Chunks are the stage's; rows longer than one are merged on the CPU."""
        if 0 < self.numel <= self.stage.small:
            self._share_a_slot(visit)
            return
        pieces = self.stage.pieces(self.numel, align)
        if pieces is None:
            self._leave_out(align * sum(s.dtype.itemsize for s in self._sources))
            super().merge_each(visit, align)
            return

        inspect = None if self._inspected else self._inspect

        def chunk(i: int) -> None:
            begin, end = pieces[i]
            with self.stage.slot() as slot:
                host, there = slot.inputs([s.dtype for s in self._sources], end - begin)
                read_into(self._sources, begin, end, host, inspect)
                back, out = slot.result(self.out_dtype, end - begin)
                base, models = self._split(there)

                def work() -> None:
                    _into(out, visit(begin, base, models, out))

                self.stage.merge(slot, work, there, [out], (back, out), lambda: self._put(begin, back))

        self.pool.each(len(pieces), chunk)
        self._inspected = True

    def in_one_call(self, runs: Callable[[Tensor | None, list[Tensor]], bool]) -> bool:
        """See :class:`Stream`. Where tensors share a slot."""
        return 0 < self.numel <= self.stage.small

    def _share_a_slot(self, visit: Merge) -> None:
        """A small tensor beside others: its calls wait for theirs where one launch takes them all."""
        dtypes = [s.dtype for s in self._sources]
        parcel = self.stage.parcel(dtypes, self.out_dtype, self.numel)
        host, there = parcel.slot.inputs(dtypes, self.numel)
        back, out = parcel.slot.result(self.out_dtype, self.numel)
        read_into(self._sources, 0, self.numel, host, None if self._inspected else self._inspect)
        self._inspected = True
        base, models = self._split(there)

        def work(batch: Batch) -> None:
            with batch.deferring() if self._one_call else contextlib.nullcontext():
                _into(out, visit(0, base, models, out))

        parcel.reads += there
        parcel.writes.append(out)
        parcel.work.append(work)
        parcel.store.append(lambda: self._put(0, back))

    def collects(self, key: str, dtype: torch.dtype = torch.float32) -> bool:
        """See :class:`Stream`."""
        there = self.stage.collected(key, self.numel, dtype) is not None
        if not there:
            self._leave_out(TRANSFORM * self.numel * dtype.itemsize)
        return there

    def collect(
        self,
        key: str,
        visit: Merge,
        dtype: torch.dtype = torch.float32,
        then: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """See :class:`Stream`. On the device where the tensor and its transform fit, else on the CPU."""
        flat = self.stage.collected(key, self.numel, dtype)
        if flat is None:
            self._leave_out(TRANSFORM * self.numel * dtype.itemsize)
            return super().collect(key, visit, dtype, then)
        whole = flat.view(self.shape)
        pieces = self.stage.pieces(self.numel) or []
        inspect = None if self._inspected else self._inspect

        def chunk(i: int) -> None:
            begin, end = pieces[i]
            with self.stage.slot() as slot:
                host, there = slot.inputs([s.dtype for s in self._sources], end - begin)
                read_into(self._sources, begin, end, host, inspect)
                base, models = self._split(there)
                here = flat[begin:end]
                self.stage.merge(slot, lambda: _into(here, visit(begin, base, models, here)), there, [here], None, None)

        self.pool.each(len(pieces), chunk)
        self._inspected = True
        if then is not None:
            self.stage.then(lambda: then(whole), flat)
        self._whole = whole
        return whole

    def emit(self, result: Tensor, *, add_base: bool = False) -> None:
        """See :class:`Stream`. What `collect` left on the device goes out from there."""
        if self._whole is None or result.data_ptr() != self._whole.data_ptr():
            super().emit(result, add_base=add_base)
            return
        flat = result.reshape(-1)
        sources = [self._origin()] if add_base else []
        pieces = self.stage.pieces(self.numel) or []

        def chunk(i: int) -> None:
            begin, end = pieces[i]
            with self.stage.slot() as slot:
                host, there = slot.inputs([s.dtype for s in sources], end - begin)
                read_into(sources, begin, end, host)
                back, out = slot.result(self.out_dtype, end - begin)
                here = flat[begin:end]

                def work() -> None:
                    if there:
                        _into(out, ops.weighted_sum(None, [there[0], here], 1.0, dtype=self.out_dtype, out=out))
                    else:
                        _into(out, here)

                self.stage.merge(slot, work, [*there, here], [out], (back, out), lambda: self._put(begin, back))

        self.pool.each(len(pieces), chunk)

    def _split(self, tensors: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        return (None, tensors) if self.base is None else (tensors[0], tensors[1:])


def _into(out: Tensor, values: Tensor) -> None:
    """values, cast to out's dtype, in out, where they may be already."""
    values = values.reshape(-1)
    if values.data_ptr() != out.data_ptr() or values.dtype != out.dtype:
        out.copy_(values)

"""Gradients of a calibration loss at any weights: what Frank-Wolfe needs from a model and its data.

``gradient(model, loss, batches)`` gives a callable ``g(state_dict) -> {name: Tensor}`` that also knows ``g.loss(state)``
and, with one data set per task, ``g.task(name)``. The weights asked for are lent to the module for the duration of the
call (no copy where device and dtype fit), so the module itself never changes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .errors import BadInput, check_choice, did_you_mean
from .losses import LOSSES, Loss

_FP16_SCALE = 1024.0  # keeps small fp16 gradients above the subnormals; divided out again in fp32


def items_in(batch: Any) -> int:
    """How many items a batch holds: the leading size of its first tensor, 1 when it has none."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((int(v.shape[0]) for v in values if isinstance(v, Tensor) and v.ndim), 1)


def _slice(batch: Any, begin: int, end: int, count: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[begin:end] if batch.ndim and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {k: _slice(v, begin, end, count) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_slice(v, begin, end, count) for v in batch)
    return batch


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(v, device) for v in batch)
    return batch


@contextlib.contextmanager
def _mode(model: nn.Module, train: bool) -> Iterator[None]:
    flags = {m: m.training for m in model.modules()}
    model.train(train)
    try:
        yield
    finally:
        for m, flag in flags.items():
            m.training = flag


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


@contextlib.contextmanager
def _lend(
    model: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Iterator[dict[str, nn.Parameter]]:
    """The module with `state`'s weights; yields its parameters that got one. Everything is put back afterwards."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    lent = {n: p for n, p in parameters.items() if n in state}
    if not lent:
        first = next(iter(state), "")
        raise BadInput(
            "the model has no parameter of the names that are merged",
            where=f"merged: {first!r}, ...; model: {next(iter(parameters), '')!r}, ...{did_you_mean(first, parameters)}",
            remedy="give the module whose state_dict the checkpoints are",
        )
    kept = [(t, t.data) for t in (*parameters.values(), *buffers.values()) if not _is_sharded(t)]
    copies: dict[Tensor, Tensor] = {}
    flags = {p: p.requires_grad for p in parameters.values()}
    grads = {p: p.grad for p in parameters.values()}
    try:
        for name, p in parameters.items():
            p.grad = None
            p.requires_grad_(name in lent)
        for name, p in lent.items():
            if state[name].shape != p.shape:
                raise BadInput(
                    f"tensor {name!r} has shape {list(state[name].shape)}, the model's parameter {list(p.shape)}",
                    remedy="leave it out with exclude=, or give the matching module (one per task if heads differ)",
                )
            if _is_sharded(p):  # FSDP2 computes from storage of its own: the values are lent, not the storage
                copies[p] = p.detach().clone()
                with torch.no_grad():
                    p.copy_(state[name])
                continue
            p.data = state[name].detach().to(p.device, dtype or state[name].dtype)
        for name, b in buffers.items():  # cloned: batch norm in train mode writes to them
            b.data = state[name].detach().to(b.device, b.dtype, copy=True) if name in state else b.data.clone()
        yield lent
    finally:
        for t, data in kept:
            t.data = data
        with torch.no_grad():
            for t, data in copies.items():
                t.copy_(data)
        for p, flag in flags.items():
            p.requires_grad_(flag)
            p.grad = grads[p]


@contextlib.contextmanager
def _checkpointed(model: nn.Module, on: bool) -> Iterator[None]:
    """Recompute the blocks (members of every ModuleList, else of every Sequential) in the backward pass."""
    if not on:
        yield
        return
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    lists = lists or [m for m in model.modules() if isinstance(m, nn.Sequential)]  # type: ignore[misc]
    blocks = [block for m in lists for block in m]
    if not blocks:
        raise BadInput(
            "gradient checkpointing needs a model with a ModuleList or Sequential of blocks", remedy="leave it off"
        )
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        if use_cache is not None:
            config.use_cache = False  # type: ignore[union-attr]  # a cache would be filled a second time by the recomputation
        for block in blocks:
            inner = block.forward

            def forward(*args: Any, _inner: Callable[..., Any] = inner, **kwargs: Any) -> Any:
                return checkpoint(_inner, *args, use_reentrant=False, **kwargs)

            block.forward = forward
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]


class Weights(dict[str, Tensor]):
    """A state dict that knows which of its names are merged; the others are the base's, for a module without its own."""

    def __init__(self, tensors: Mapping[str, Tensor], merged: Iterable[str]) -> None:
        super().__init__(tensors)
        self.merged = frozenset(merged)


class Gradient:
    """``gradient(state_dict) -> {name: Tensor}`` of a calibration objective; made by :func:`gradient`.

    ``value`` is the objective at the last weights a gradient was asked for; ``loss(state)`` evaluates it alone;
    ``tasks`` names the tasks and ``task(name)`` is the same object for one of them; ``items`` is the data's size.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        losses: Mapping[str, Loss],
        batches: Mapping[str, Iterable[Any]],
        *,
        micro_batch: int | None,
        train_mode: bool,
        amp: torch.dtype | None,
        checkpointing: bool,
        reduction: str,
        dtype: torch.dtype | None,
        names: frozenset[str] | None,
        own: bool,
        workers: int,
    ) -> None:
        self._models, self._losses, self._batches = dict(models), dict(losses), dict(batches)
        self._options: dict[str, Any] = {
            "micro_batch": micro_batch,
            "train_mode": train_mode,
            "amp": amp,
            "checkpointing": checkpointing,
            "reduction": reduction,
            "dtype": dtype,
            "names": names,
            "own": own,
            "workers": workers,
        }
        self._parts: list[Gradient] = []
        self.tasks = tuple(self._batches)
        self._counts = {task: sum(items_in(b) for b in data) for task, data in self._batches.items()}
        for task, count in self._counts.items():
            if not count:
                raise BadInput(
                    "there is no calibration data",
                    where=f"task {task!r}" if task else None,
                    remedy="give at least one batch (an iterator that was read before is empty)",
                )
        self.items = sum(self._counts.values())
        self.value: float | None = None
        # Tied parameters have one gradient, under the first name.
        self.aliases: dict[str, str] = {}
        for model in self._models.values():
            first: dict[int, str] = {}
            for name, p in model.named_parameters(remove_duplicate=False):
                if first.setdefault(id(p), name) != name:
                    self.aliases[name] = first[id(p)]

    def task(self, name: str) -> Gradient:
        """The gradient of one task's objective."""
        if name not in self._batches:
            raise BadInput(
                f"there is no task {name!r}{did_you_mean(name, self.tasks)}",
                remedy=f"the tasks are {', '.join(self.tasks)}"
                if any(self.tasks)
                else "give batches as a mapping from task to data",
            )
        pick = {name: self._models[name]}, {name: self._losses[name]}, {name: self._batches[name]}
        return Gradient(*pick, **self._options)

    def loss(self, state: Mapping[str, Tensor]) -> float:
        """The objective at `state`; no gradient. Cost: one forward pass over the data."""
        return self._run(state, False)[1]

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by name, in the dtype the weights were lent in; parameters the loss does not reach are left out.

        Cost: a forward and a backward pass over the data; memory of one gradient and one micro-batch's activations.
        Raises BadInput naming the parameter when a gradient is not finite.
        """
        gradients, self.value = self._run(state, True)
        for name, g in gradients.items():
            # A sum is NaN or Inf where an element is: one pass, without a mask. It may overflow by itself, too.
            if not bool(torch.isfinite(g.sum())) and not bool(torch.isfinite(g).all()):
                raise BadInput(
                    f"the gradient of {name!r} is not finite",
                    remedy="check the calibration data and loss; with amp=float16 try bfloat16",
                )
        return gradients

    def _split(self) -> list[Gradient]:
        """One part per worker: every workers-th batch, on a copy of the modules that shares nothing but lent weights."""
        if not self._parts:
            count = self._options["workers"]
            for w in range(count):
                part = copy.copy(self)
                part._models = copy.deepcopy(self._models) if w else self._models
                part._batches = {task: list(data)[w::count] for task, data in self._batches.items()}
                part._options = {**self._options, "workers": 1}
                self._parts.append(part)
        return self._parts

    def _run_parts(self, state: Mapping[str, Tensor], backward: bool) -> tuple[dict[str, Tensor], float]:
        parts, before = self._split(), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(len(parts), initializer=torch.set_num_threads, initargs=(1,)) as pool:
                found = list(pool.map(lambda part: part._run(state, backward), parts))
        finally:
            torch.set_num_threads(before)
        total, value = found[0]
        for more, added in found[1:]:  # in the parts' order: the same sum whichever ends first
            value += added
            for name, g in more.items():
                if name in total:
                    total[name].add_(g)
                else:
                    total[name] = g
        return total, value

    def _run(self, state: Mapping[str, Tensor], backward: bool) -> tuple[dict[str, Tensor], float]:
        if self._options["workers"] > 1:
            return self._run_parts(state, backward)
        total: dict[str, Tensor] = {}
        value = 0.0
        wanted = self._options["names"]
        if isinstance(state, Weights):
            wanted = state.merged if wanted is None else wanted & state.merged
            if self._options["own"]:  # what is not merged, a head say, is each task's own
                state = {n: t for n, t in state.items() if n in state.merged}
        for task in self.tasks:
            mean = self._options["reduction"] == "mean"
            scale = 1.0 / (self._counts[task] * len(self.tasks)) if mean else 1.0
            with (
                _mode(self._models[task], self._options["train_mode"]),
                _lend(self._models[task], state, self._options["dtype"]) as lent,
                _checkpointed(self._models[task], self._options["checkpointing"] and backward),
                torch.set_grad_enabled(backward),
            ):
                for name, p in lent.items():
                    p.requires_grad_(backward and (wanted is None or name in wanted))
                    if name in total:
                        p.grad = total.pop(name)
                value += self._pass(task, scale, backward)
                for name, p in lent.items():
                    if p.grad is not None:
                        total[name] = p.grad
        return total, value

    def _pass(self, task: str, scale: float, backward: bool) -> float:
        model, loss, amp = self._models[task], self._losses[task], self._options["amp"]
        device = next(model.parameters()).device
        value = 0.0
        up = _FP16_SCALE if amp == torch.float16 else 1.0
        for batch in self._batches[task]:
            count = items_in(batch)
            size = self._options["micro_batch"] or count
            for begin in range(0, count, size):
                end = min(begin + size, count)
                part = _to(_slice(batch, begin, end, count), device)
                with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
                    losses = loss(model, part)
                # A scalar is the mean over the micro-batch's items, a vector has one loss per item.
                part_sum = losses.float() * (end - begin) if losses.ndim == 0 else losses.float().sum()
                value += float(part_sum.detach()) * scale
                if backward:
                    (part_sum * (scale * up)).backward()
        if backward and up != 1.0:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(up)
        return value


def gradient(
    model: nn.Module | Mapping[str, nn.Module],
    loss: str | Loss | Mapping[str, str | Loss],
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    *,
    micro_batch: int | None = None,
    train_mode: bool = False,
    amp: torch.dtype | None = None,
    checkpointing: bool = False,
    reduction: Literal["mean", "sum"] = "mean",
    dtype: torch.dtype | None = None,
    parameters: Iterable[str] | None = None,
    workers: int = 1,
) -> Gradient:
    """A callable that differentiates a calibration loss at any weights.

    The objective is the mean over items (and then over tasks), or with ``reduction="sum"`` the sum over all items.

    Args:
        model: the module whose state_dict is merged, or one per task (heads of their own: parameters that are not
            merged keep each module's values and get no gradient).
        loss: "cross_entropy", "causal_lm", "mse", "entropy" (unlabelled data), or ``f(module, batch) -> Tensor``, one
            loss per item or their mean; one per task as a mapping.
        batches: an iterable of (inputs, labels), dicts with "labels" (as Hugging Face models take them) or bare
            inputs; or a mapping from task to such an iterable. One-shot iterators are kept as lists.
        micro_batch: split batches to at most this many items; bounds the memory of activations.
        train_mode: False evaluates with dropout off and batch norm's statistics fixed, so that the gradient is
            deterministic; True is what the published code does. Statistics are never changed either way.
        amp: torch.bfloat16 or torch.float16 autocast.
        checkpointing: recompute blocks in the backward pass.
        dtype: run the module in this dtype (default: that of the weights given, float32 in Frank-Wolfe).
        parameters: names to differentiate (default: every parameter the weights have).
        workers: batches that are differentiated at once, each on one thread and on its own copy of the module: for
            modules on the CPU that are too small to keep all threads busy. Costs a module and a gradient per worker;
            the loss must use the module it is given, and dropout noise (train_mode) is not repeatable.

    Raises: BadInput for unknown losses, missing labels, empty data, names or shapes that do not fit, and gradients
        that are not finite.
    Cost: see :class:`Gradient`. Nothing is copied where the weights already are on the module's device.
    """
    check_choice("reduction", reduction, ("mean", "sum"))
    if micro_batch is not None and micro_batch < 1:
        raise BadInput(
            f"micro_batch must be at least 1, not {micro_batch}", remedy="leave it out to keep batches whole"
        )
    if amp not in (None, torch.bfloat16, torch.float16):
        raise BadInput(f"amp must be torch.bfloat16, torch.float16 or None, not {amp}", remedy="amp=torch.bfloat16")
    if workers < 1:
        raise BadInput(f"workers must be at least 1, not {workers}", remedy="leave it out: 1 is the default")
    models = list(model.values()) if isinstance(model, Mapping) else [model]
    if workers > 1 and any(p.device.type != "cpu" or _is_sharded(p) for m in models for p in m.parameters()):
        raise BadInput("workers > 1 is for whole modules on the CPU", remedy="leave it out")
    by_task = batches if isinstance(batches, Mapping) else {"": batches}
    if not by_task:
        raise BadInput("batches is empty: it names no task", remedy="give {task: batches} with one task or more")
    data = {t: list(b) if iter(b) is b else b for t, b in by_task.items()}

    def per_task(what: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            return dict.fromkeys(data, value)
        if set(value) != set(data):
            raise BadInput(f"{what} has tasks {sorted(value)}, batches {sorted(data)}", remedy="use the same names")
        return dict(value)

    losses: dict[str, Loss] = {}
    for task, given in per_task("loss", loss).items():
        if isinstance(given, str) and given not in LOSSES:
            raise BadInput(f"unknown loss {given!r}{did_you_mean(given, LOSSES)}", remedy=f"one of {', '.join(LOSSES)}")
        losses[task] = LOSSES[given] if isinstance(given, str) else given
    return Gradient(
        per_task("model", model),
        losses,
        data,
        micro_batch=micro_batch,
        train_mode=train_mode,
        amp=amp,
        checkpointing=checkpointing,
        reduction=reduction,
        dtype=dtype,
        names=None if parameters is None else frozenset(parameters),
        own=isinstance(model, Mapping),
        workers=workers,
    )

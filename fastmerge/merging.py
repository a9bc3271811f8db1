"""Merging from Python: state dicts, modules or checkpoint paths in, the same kind out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from . import _native
from ._dispatch import batched
from .device import Fleet, Stage
from .device.choose import parse
from .engine import run
from .errors import BadInput
from .io.checkpoint import Checkpoint, from_state_dict, listed, open_checkpoint
from .io.pipeline import Pool, opened
from .job import Job
from .methods import Method
from .preflight import Planned
from .recipe import Recipe
from .report import Report

Model = str | Path | Mapping[str, Tensor] | nn.Module


def _is_path(model: Model) -> bool:
    return isinstance(model, (str, Path))


def _checkpoint(model: Model, label: str, allow_pickle: bool) -> Checkpoint:
    if isinstance(model, (str, Path)):
        return open_checkpoint(model, allow_pickle=allow_pickle)
    if isinstance(model, nn.Module):
        from .structure.naming import heads_of

        return from_state_dict(model.state_dict(), label, heads_of(model))
    if isinstance(model, Mapping):
        return from_state_dict(model, label)
    raise BadInput(
        f"{label} is a {type(model).__name__}", remedy="pass a state_dict, an nn.Module or the path of a checkpoint"
    )


@overload
def merge(
    method: str, base: Model | None, models: Sequence[Model], *, out: str | Path, **parameters: Any
) -> Report: ...
@overload
def merge(
    method: str, base: nn.Module, models: Sequence[Model], *, out: None = None, **parameters: Any
) -> nn.Module: ...
@overload
def merge(
    method: str,
    base: Mapping[str, Tensor] | str | Path | None,
    models: Sequence[Model],
    *,
    out: None = None,
    **parameters: Any,
) -> Any: ...
def merge(
    method: str,
    base: Model | None,
    models: Sequence[Model],
    *,
    out: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    max_vram: int | None = None,
    nan: str = "error",
    seed: int = 0,
    allow_pickle: bool = False,
    ignore_extra: bool = False,
    **parameters: Any,
) -> Any:
    """Merge models by a method.

    Args:
        method: a name from ``fastmerge.methods.names()``.
        base: the model the others were fine-tuned from; None for methods that need none.
        models: state dicts, modules or checkpoint paths, in the order that per-model parameters refer to.
        out: a folder to write to; then base and models must be paths, and a Report is returned.
        dtype: of the merged tensors; default: each tensor's dtype in the base (else in the first model).
        device: "auto" | "cpu" | "cuda" | "cuda:i" | "cuda:all", where models in host memory and on disk are merged, as
            for :func:`fastmerge.run`; models that are on a GPU already are merged there, with "auto".
        max_vram: bytes on each GPU; default 80 % of what is free.
        nan: "error" | "warn" | "allow": what NaN or Inf in an input does.
        parameters: the method's, by recipe name (``lambda`` is spelled ``lambda_``); a per-model parameter takes a
            number or a list of one per model.

    Returns: a state dict of new tensors (tied names stay tied) for state dicts and paths; for modules a copy of the
        first of base and models that carries the merged weights; a Report with `out`. Inputs are never changed.
    Raises: BadInput, naming tensor and model.
    Cost: in memory, the output plus the method's workspace; every input is read once per pass.
    """
    models = listed(models)
    everything = [*([] if base is None else [base]), *models]
    if not models:
        raise BadInput("models is empty", remedy="give at least one model")
    stored = None if dtype is None else str(dtype).removeprefix("torch.")
    if out is not None:
        if not all(_is_path(m) for m in everything):
            raise BadInput(
                "out= writes a folder from checkpoint paths, but a model is in memory",
                remedy="leave out= away, and save the returned state_dict",
            )
        recipe = Recipe.from_call(
            method,
            None if base is None else str(base),
            [str(m) for m in models],
            parameters,
            out_dtype=stored,
            seed=seed,
        )
        return run(
            recipe,
            out,
            device=device,
            max_vram=max_vram,
            nan=nan,
            allow_pickle=allow_pickle,
            ignore_extra=ignore_extra,
        )
    labels = [str(m) if _is_path(m) else f"models[{i}]" for i, m in enumerate(models)]
    base_label = None if base is None else str(base) if _is_path(base) else "base"
    recipe = Recipe.from_call(method, base_label, labels, parameters, out_dtype=stored, seed=seed)
    checkpoints = [_checkpoint(m, label, allow_pickle) for m, label in zip(models, labels, strict=True)]
    reference = checkpoints[0] if base is None else _checkpoint(base, base_label or "base", allow_pickle)
    state = merge_checkpoints(
        recipe, reference, checkpoints, device=device, max_vram=max_vram, nan=nan, ignore_extra=ignore_extra
    )
    first = everything[0]
    if isinstance(first, nn.Module):
        merged = copy.deepcopy(first)
        if dtype is not None:
            merged = merged.to(dtype)
        merged.load_state_dict(state)
        return merged
    return state


def merge_checkpoints(
    recipe: Recipe,
    template: Checkpoint,
    models: Sequence[Checkpoint],
    *,
    device: str = "auto",
    max_vram: int | None = None,
    nan: str = "error",
    ignore_extra: bool = False,
) -> dict[str, Tensor]:
    """Merge opened checkpoints into a new state dict, names in the template's order, tied names tied.

    The template is the base, or the first model when the recipe names none; models are those of ``recipe.inputs``.
    """
    method: Method = recipe.method
    if method.files_pass is not None:
        raise BadInput(
            f"{method.name} makes files beside the merged weights, which a state dict can not hold",
            remedy="pass out=, a folder" + (", or use fm.free" if method.name == "free" else ""),
        )
    base = template if recipe.base_model is not None and method.base != "ignored" else None
    with opened(1, in_memory=True) as (pool, files), torch.no_grad(), batched() as batch:
        job = Job(
            recipe, method, template, base, models, pool, files, nan=nan, ignore_extra=ignore_extra, go_on='nan="warn"'
        )  # fmt: skip
        fleet = _fleet(job, device, max_vram)
        state: dict[str, Tensor] = {}
        plan = job.fit()
        try:
            for t in job.planned:
                where = t.reference.tensor.device if t.reference.tensor is not None else torch.device("cpu")
                state[t.name] = result = _native.fresh(t.reference.shape, t.dtype, where)
                if t.copied:
                    result.reshape(-1).copy_(t.reference.read(0, t.numel, pool.buffers, "copy"))
                elif not fleet.stages:
                    place, put = _into(result.view(-1))
                    job.apply(t, plan, put, place, batch=batch)

            def merge_there(t: Planned, stage: Stage, its_pool: Pool) -> None:
                place, put = _into(state[t.name].view(-1))
                job.apply(t, plan, put, place, stage, its_pool)

            if fleet.stages:
                fleet.each([t for t in job.planned if not t.copied], lambda t: t.numel, merge_there)
        except Exception:
            with contextlib.suppress(RuntimeError):  # of a device that is lost
                job.settle()  # NaN is why, if there is one
            raise
        job.settle()
    for alias, name in template.aliases.items():
        state[alias] = state[name]
    return state


def _fleet(job: Job, device: str, max_vram: int | None) -> Fleet:
    """The stages for models in host memory and on disk; none where tensors are on a GPU and stay there."""
    there = {str(t.device) for m in [job.template, *job.models] for t in m.resident.values() if t.device.type != "cpu"}
    if there:
        if parse(device) != "auto":
            raise BadInput(
                f"device {device!r} is asked for, but tensors are on {', '.join(sorted(there))}",
                remedy="device='auto' merges them where they are; or move them to the CPU first",
            )
        return Fleet([], job.pool)
    choice = job.choose(device)
    budgets = job.budgets(choice, max_vram, None)
    return Fleet([Stage(*both) for both in zip(choice.devices, budgets, strict=True)], job.pool)


def _into(flat: Tensor) -> tuple[Callable[[int, int], Tensor], Callable[[int, Tensor], None]]:
    def place(begin: int, end: int) -> Tensor:
        return flat[begin:end]

    def put(offset: int, values: Tensor) -> None:
        target = flat[offset : offset + values.numel()]
        if target.data_ptr() != values.data_ptr():
            target.copy_(values)

    return place, put

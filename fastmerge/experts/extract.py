"""Extracting FREE's experts: the largest entries of every task vector, and how strongly they are added back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import _native
from ..errors import BadInput
from ..io.checkpoint import Checkpoint, from_state_dict, listed, open_checkpoint
from ..io.files import Files
from ..io.pipeline import Pool, Source, Stream, opened
from ..methods._fr_rules import Rule, resolve
from ..methods.fr import lambdas_of
from .collect import Collection, check_parameters, task_names
from .storage import Expert

Model = str | Path | Mapping[str, Tensor] | nn.Module


def extract(
    base: Model,
    models: Sequence[Model],
    *,
    tasks: Sequence[str] | None = None,
    density: float | Sequence[float] = 0.01,
    trim: Literal["topk", "window", "random", "rank_random"] = "topk",
    by: Literal["row", "tensor"] = "row",
    mu: Literal["paper", "balanced", "vit", "constant"] = "paper",
    constant: float = 7.0,
    combine: Literal["add", "override"] = "add",
    experts: str = "",
    allow_pickle: bool = False,
    seed: int = 0,
    **parameters: Any,
) -> list[Expert]:
    """The experts of FREE-Merging, one per model: eᵢ = μᵢ·M(vᵢ, d) with vᵢ = modelᵢ − base.

    M keeps, of every row of the last axis (``by="row"``) or of every tensor, the int(d·n) entries of largest magnitude,
    at least one, ties to the first. Tensors with less than two axes, and those whose rows are so short that
    int(d·length) is 0, are treated as one row: the density of the tensor is kept instead of a whole entry per row.

    Args:
        base, models: state dicts, modules or checkpoint paths.
        tasks: names of the experts; default: the folders' names, else ``task1`` …
        density: d in (0, 1], one number or one per model.
        trim: what M is: ``topk``; ``window``: without the int(gamma·n) largest, as Breadcrumbs; ``random``: each entry
            with probability d; ``rank_random``: with probability d ± epsilon by its rank, as DELLA.
        mu: ``paper``: μᵢ = −E(M(vᵢ))·ln d / (λᵢ·E(vᵢ)), means of magnitudes over kept entries and over all, λᵢ the
            coefficient `fr` gives the model (scope "model": one μ for all tensors; "tensor": one each);
            ``balanced`` (ours): μᵢ² = (‖vᵢ‖₁/‖M(vᵢ)‖₁)·(‖vᵢ‖₂/‖M(vᵢ)‖₂); ``vit``: μᵢ = −(E/d)·log10 d / T, E and T means
            over tensors of the mean magnitudes of the expert and of the filtered delta, as the published ViT code;
            ``constant``: `constant`. docs/free.md compares them. Where a delta is all zero the expert is empty and
            μ = 0; a non-finite μ never occurs for finite inputs.
        combine: written into the experts: how they are meant to be used (see FreeModel).
        experts: regular expression found in the names that get expert entries (default: every floating tensor).
        seed: of ``random`` and ``rank_random``.
        parameters: further ones of method ``free``: gamma, epsilon, and those of the backbone (lambda_policy, scope,
            select, mask, cutoff, preset, …).

    Cost: one read of every tensor (``by="tensor"``: and parts of it again; ``vit``: and once more per model).
    Memory: the entries, and chunks of the inputs; one tensor for ``vit``.
    Raises: BadInput for tensors that differ in name or shape, a density outside (0, 1], or unknown parameters.
    Source: FREE-Merging (arXiv:2411.16815), eq. 7-8.
    """
    models = listed(models)
    own = {"density": density, "trim": trim, "by": by, "mu": mu, "constant": constant, "combine": combine}
    values = method_parameters("free", {**own, "experts": experts, **parameters}, len(models))
    check_parameters(values)
    labels = [str(m) if isinstance(m, (str, Path)) else None for m in models]
    collection = Collection(task_names(tasks, labels))
    origin = open_model(base, "base", allow_pickle)
    others = [
        open_model(m, label or f"models[{i}]", allow_pickle)
        for i, (m, label) in enumerate(zip(models, labels, strict=True))
    ]
    with opened(_native.threads(), in_memory=True) as (pool, files), torch.no_grad():
        for stream in streams(origin, others, pool, files, values, seed):
            collection.add(stream)
    return collection.experts()


def method_parameters(method: str, given: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Keyword arguments as a recipe's parameters for one tensor of `count` models, checked: BadInput names the bad one."""
    from ..methods import get

    known = get(method).parameters
    by_name = {k[:-1] if k == "lambda_" else k: v for k, v in given.items()}
    unknown = sorted(set(by_name) - set(known))
    if unknown:
        raise BadInput(f"{method} has no parameter {unknown[0]!r}", remedy=f"its parameters are {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, p in known.items():
        raw = by_name.get(name, p.default)
        remedy = f"change {name}, or leave it out for its default"
        try:
            if not p.per_model:
                values[name] = None if raw is None and p.optional else p.check(raw)
                continue
            each = list(raw) if isinstance(raw, (list, tuple)) else [raw] * count
            if len(each) != count:
                remedy = "give one value for all models, or one per model in their order"
                raise ValueError(f"{name} has {len(each)} entries for {count} models")
            values[name] = [p.check(v) for v in each]
        except ValueError as error:
            raise BadInput(str(error), remedy=remedy) from None
    return values


def fr_rule(given: Mapping[str, Any], count: int) -> tuple[Rule, list[float]]:
    """fr's rule and per-model lambdas from its keyword arguments."""
    values = method_parameters("fr", given, count)
    rule = resolve(values)
    return rule, lambdas_of(values["lambda"], rule, count)


def open_model(model: Model, label: str, allow_pickle: bool) -> Checkpoint:
    if isinstance(model, (str, Path)):
        return open_checkpoint(model, allow_pickle=allow_pickle)
    return from_state_dict(model.state_dict() if isinstance(model, nn.Module) else model, label)


def streams(
    base: Checkpoint,
    models: Sequence[Checkpoint],
    pool: Pool,
    files: Files,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Iterator[Stream]:
    """The floating tensors of the base, with the models' of the same name."""

    def nowhere(offset: int, values: Tensor) -> None:
        raise RuntimeError("extraction emits nothing")

    for name in base.names():
        if name in base.aliases or not base.dtype(name).is_floating_point:
            continue
        for m in models:
            if name not in m or m.shape(name) != base.shape(name):
                shape = tuple(m.shape(name)) if name in m else "no such tensor"
                raise BadInput(
                    f"tensor {name!r} is {tuple(base.shape(name))} in the base, but {shape}",
                    where=m.label,
                    remedy="experts need models of one architecture",
                )
        yield Stream(
            name,
            Source(base, name, files),
            [Source(m, name, files) for m in models],
            parameters=parameters or {},
            out_dtype=base.dtype(name),
            start=0,
            seed=seed,
            chunk=1 << 18,
            pool=pool,
            put=nowhere,
        )

"""Extracting FREE's experts: the largest entries of every task vector, and how strongly they are added back."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import BadInput
from ..io.checkpoint import Checkpoint, from_state_dict, open_checkpoint
from ..io.pipeline import Files, Pool, Source, Stream, opened
from ..methods._fr_rules import Rule, resolve
from ..methods.fr import coefficients
from .storage import Expert, Sparse

Model = str | Path | Mapping[str, Tensor] | nn.Module
MU = ("paper", "vit", "constant")


def extract(
    base: Model,
    models: Sequence[Model],
    *,
    tasks: Sequence[str] | None = None,
    density: float = 0.01,
    by: Literal["row", "tensor"] = "row",
    mu: Literal["paper", "vit", "constant"] = "paper",
    constant: float = 7.0,
    experts: str = "",
    allow_pickle: bool = False,
    **fr: Any,
) -> list[Expert]:
    """The experts of FREE-Merging, one per model: eᵢ = μᵢ·M(vᵢ, d) with vᵢ = modelᵢ − base.

    M keeps, of every row of the last axis (``by="row"``) or of every tensor, the int(d·n) entries of largest magnitude,
    at least one, ties to the first. Tensors with less than two axes, and those whose rows are so short that
    int(d·length) is 0, are treated as one row: the density of the tensor is kept instead of a whole entry per row.

    Args:
        base, models: state dicts, modules or checkpoint paths.
        tasks: names of the experts; default: the folders' names, else ``task1`` …
        density: d in (0, 1].
        mu: ``paper``: μᵢ = −E(M(vᵢ))·ln d / (λᵢ·E(vᵢ)), means of magnitudes over kept entries and over all, λᵢ the
            coefficient `fr` gives the model (scope "model": one μ for all tensors; "tensor": one each);
            ``vit``: μᵢ = −(E/d)·log10 d / T, E and T means over tensors of the mean magnitudes of the expert and of
            the filtered delta, as the published ViT code; ``constant``: `constant`.
            Where a delta is all zero the expert is empty and μ = 0; a non-finite μ never occurs for finite inputs.
        experts: regular expression found in the names that get expert entries (default: every floating tensor).
        fr: parameters of the backbone's method `fr` (lambda_policy, scope, select, mask, cutoff, preset, …).

    Cost: two reads of every tensor; one top-k a tensor and model; for ``vit`` one filter each too.
    Raises: BadInput for tensors that differ in name or shape, a density outside (0, 1], or unknown parameters.
    Source: FREE-Merging (arXiv:2411.16815), eq. 7-8.
    """
    if not 0 < density <= 1:
        raise BadInput(f"density must be in (0, 1], not {density}")
    if mu not in MU or by not in ("row", "tensor"):
        raise BadInput(f"mu is one of {', '.join(MU)} and by row or tensor; got {mu!r}, {by!r}")
    rule, lambdas = _rule(fr, len(models))
    labels = [str(m) if isinstance(m, (str, Path)) else f"models[{i}]" for i, m in enumerate(models)]
    tasks = _tasks(tasks, models)
    opened_base = _open(base, "base", allow_pickle)
    opened_models = [_open(m, label, allow_pickle) for m, label in zip(models, labels, strict=True)]
    found: list[dict[str, Sparse]] = [{} for _ in models]
    all_sums, kept_sums, kept_counts, count = [0.0] * len(models), [0.0] * len(models), [0] * len(models), 0
    vit = [[0.0, 0.0] for _ in models]  # sums over tensors of E and T
    per_tensor: dict[str, list[float]] = {}
    tensors = 0
    with opened(1) as (pool, files), torch.no_grad():
        for stream in _streams(opened_base, opened_models, pool, files):
            if not stream.numel or re.search(experts, stream.name) is None:
                continue
            tensors += 1
            origin, others = stream.whole()
            assert origin is not None
            measured = rule.filters(stream.name, stream.shape)
            count += stream.numel if measured else 0
            here: list[float] = []
            for i, model in enumerate(others):
                delta = ops.weighted_sum(origin, [model], 1.0, add_base=False, dtype=_wide(origin, model))
                kept = _keep(delta, density, by, origin.dtype)
                found[i][stream.name] = kept
                total = _abs_sum(delta)
                kept_total = float(kept.value.double().abs().sum())
                if measured:
                    all_sums[i] += total
                    kept_sums[i] += kept_total
                    kept_counts[i] += kept.index.numel()
                here.append(total / stream.numel)
                if mu == "vit":
                    if measured:
                        ops.highpass_filter(delta, rule.cutoff, mask=rule.mask, ring_double=rule.ring_double, out=delta)
                    vit[i][0] += kept_total / stream.numel
                    vit[i][1] += _abs_sum(delta) / stream.numel
            per_tensor[stream.name] = here
    means = [s / max(count, 1) for s in all_sums]
    shares = coefficients(rule, lambdas, means, len(models))
    out: list[Expert] = []
    for i, task in enumerate(tasks):
        whole = 0.0
        if mu == "paper":
            whole = _mu(kept_sums[i], kept_counts[i], density, shares[i] * means[i])
        elif mu == "vit":
            e, t = (v / max(tensors, 1) for v in vit[i])
            whole = -(e / density) * math.log10(density) / t if t > 0 else 0.0
        final: dict[str, Sparse] = {}
        for name, s in found[i].items():
            value = constant if mu == "constant" else whole
            if mu == "paper" and rule.scope == "tensor":
                share = coefficients(rule, lambdas, per_tensor[name], len(models))[i]
                total = float(s.value.double().abs().sum())
                value = _mu(total, s.index.numel(), density, share * per_tensor[name][i])
            final[name] = Sparse(s.shape, s.index, s.value, value if s.index.numel() else 0.0)
        about: dict[str, str] = {"mu": mu, "by": by}
        out.append(Expert(task, final, density, about))
    return out


def _mu(kept_sum: float, kept_count: int, density: float, scaled_mean: float) -> float:
    """−E(M)·ln d / (λ·E), 0 where the delta is zero."""
    if kept_count == 0 or scaled_mean <= 0:
        return 0.0
    return -(kept_sum / kept_count) * math.log(density) / scaled_mean


def _keep(delta: Tensor, density: float, by: str, dtype: torch.dtype) -> Sparse:
    """The kept entries, in the base's dtype; zeros among them are dropped."""
    rows = by == "row" and delta.ndim >= 2 and int(delta.shape[-1] * density) >= 1
    mask: Tensor = ops.topk_mask(delta, density, dim=-1 if rows else None)
    index = mask.view(-1).nonzero().squeeze(1)
    value = delta.reshape(-1)[index].to(dtype)
    there = value != 0
    if not bool(there.all()):
        index, value = index[there], value[there]
    return Sparse(tuple(delta.shape), index.cpu(), value.cpu())


def _abs_sum(delta: Tensor) -> float:
    return math.fsum(v for v in ops.abs_sum(None, [delta])[0].tolist() if math.isfinite(v))


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _rule(given: Mapping[str, Any], count: int) -> tuple[Rule, list[float]]:
    """fr's rule and per-model lambdas from its keyword arguments (checked as a recipe's are)."""
    from ..methods import get

    known = get("fr").parameters
    by_name = {k[:-1] if k == "lambda_" else k: v for k, v in given.items()}
    unknown = sorted(set(by_name) - set(known))
    if unknown:
        raise BadInput(f"fr has no parameter {unknown[0]!r}", remedy=f"its parameters are {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, p in known.items():
        try:
            raw = by_name.get(name, p.default)
            values[name] = [p.check(v) for v in raw] if p.per_model and isinstance(raw, (list, tuple)) else p.check(raw)
        except ValueError as error:
            raise BadInput(str(error)) from None
    rule = resolve(values)
    each = values["lambda"]
    each = each if isinstance(each, list) else [each] * count
    return rule, [rule.lambda_ if v is None else float(v) for v in each]


def _tasks(tasks: Sequence[str] | None, models: Sequence[Model]) -> list[str]:
    if tasks is None:
        tasks = [Path(m).name if isinstance(m, (str, Path)) else f"task{i + 1}" for i, m in enumerate(models)]
    if len(tasks) != len(models) or len(set(tasks)) != len(tasks):
        raise BadInput(
            f"{len(models)} models need as many different task names, not {list(tasks)}", remedy="pass tasks=[...]"
        )
    bad = [t for t in tasks if not re.fullmatch(r"[\w.+-]+", t)]
    if bad:
        raise BadInput(f"task name {bad[0]!r} can not be a file name", remedy="use letters, digits and . _ + -")
    return list(tasks)


def _open(model: Model, label: str, allow_pickle: bool) -> Checkpoint:
    if isinstance(model, (str, Path)):
        return open_checkpoint(model, allow_pickle=allow_pickle)
    return from_state_dict(model.state_dict() if isinstance(model, nn.Module) else model, label)


def _streams(base: Checkpoint, models: Sequence[Checkpoint], pool: Pool, files: Files) -> Iterator[Stream]:
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
            parameters={},
            out_dtype=base.dtype(name),
            start=0,
            seed=0,
            chunk=1 << 20,
            pool=pool,
            put=nowhere,
        )

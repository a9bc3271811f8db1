"""fm.mudsc: align or zip networks and average them, BatchNorm statistics re-estimated."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..ops import permute_merge
from .alignment import Alignment, align
from .naming import state_of
from .trace import as_call

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class MudscResult:
    """The merged network (a module when modules were given), its tensors, and how the models were aligned."""

    state: dict[str, Tensor]
    alignment: Any  # Alignment or ZipAlignment
    model: nn.Module | None = None


def average(
    states: Sequence[Mapping[str, Tensor]],
    alignment: Alignment,
    weights: Sequence[float] | None = None,
    *,
    reference_bugs: bool = False,
) -> dict[str, Tensor]:
    """The weighted mean of models in the anchor's frame; tensors the spec does not list are averaged as they are.

    Integer tensors (counters, position ids) are the first model's; `reference_bugs` averages them as floats and scales
    every permuted output axis by N / (N + 1e-5), as published.
    """
    share = model_weights(weights, len(states))
    spec = alignment.spec
    out: dict[str, Tensor] = {}
    for name, base in states[0].items():
        others = [s[name] for s in states[1:]]
        if not base.is_floating_point():
            out[name] = base.clone()
            if reference_bugs:
                total_count = base.float()
                for other in others:
                    total_count = total_count + other.float()
                out[name] = total_count / len(states)
            continue
        low = base.dtype in (torch.float16, torch.bfloat16)
        total, merged = share[0], base
        for m, other in enumerate(others, 1):
            total += share[m]
            last = m == len(others)
            dtype = base.dtype if last or not low else torch.float32
            perms = alignment.perms[m]
            if spec.crossing(name) if name in spec.tensors else False:
                other, indices = spec.permute(name, other, perms), {}
            else:
                indices = {a.axis: i for a in spec.tensors.get(name, ()) if (i := spec.index(a, perms)) is not None}
            if merged.ndim == 0:
                indices = {}
            weight = share[m] / total if total else 0.0
            moved = permute_merge(merged, other.to(merged.device), indices, weight, dtype=dtype, check=False)
            assert isinstance(moved, Tensor)
            merged = moved
        if reference_bugs and alignment.perms[1:]:
            count = sum(a.role == "out" for a in spec.tensors.get(name, ()))
            merged = merged * (len(states) / (len(states) + 1e-5)) ** count
        out[name] = merged.clone() if merged is base else merged
    return out


def model_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights of `count` models that sum to 1; equal ones for None."""
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count:
        raise BadInput(
            f"weights has {len(weights)} entries for {count} models",
            remedy="give one weight per model, or leave weights= out for equal ones",
        )
    total = float(sum(weights))
    if not total > 0 or any(w < 0 for w in weights):
        raise BadInput(
            f"weights must be >= 0 with a positive sum, not {list(weights)}",
            remedy="leave weights= out for equal ones; they need not sum to 1",
        )
    return [float(w) / total for w in weights]


def has_batchnorm(state: Mapping[str, Tensor]) -> bool:
    return any(name.endswith("running_var") for name in state)


def warn_batchnorm(parameter: str) -> None:
    """The warning about statistics that were averaged and not re-estimated; `parameter` would take the data."""
    warnings.warn(
        "the merged network has BatchNorm layers and their running statistics are only averaged: its activations "
        f"have lost variance and accuracy will suffer. Pass {parameter}=batches with nn.Modules, or "
        f"{parameter}=False if you re-estimate them yourself.",
        stacklevel=3,
    )


@torch.no_grad()
def reset_batchnorm(model: nn.Module, batches: Iterable[Any]) -> int:
    """Re-estimates the running statistics of every BatchNorm as plain averages over one pass of the data.

    Only BatchNorm layers are put into training mode (dropout stays off); flags and momenta come back even when the model
    raises. Returns the number of layers; 0 leaves the data untouched.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    flags = {m: m.training for m in model.modules()}
    momenta = [m.momentum for m in norms]
    statistics = [{k: v.clone() for k, v in m.state_dict().items()} for m in norms]
    seen = 0
    try:
        model.eval()
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative average
            m.train()
        for batch in batches:
            args, kwargs = as_call(batch)
            model(*args, **kwargs)
            seen += 1
    finally:
        if not seen:
            for m, before in zip(norms, statistics, strict=True):
                m.load_state_dict(before)
        for module, flag in flags.items():
            module.training = flag
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
    if not seen:
        raise BadInput(
            "no batch to re-estimate BatchNorm statistics from",
            remedy="give a list of batches of inputs (an iterator that was read before is empty)",
        )
    return len(norms)


def mudsc(
    models: Sequence[Any],
    spec: Any = None,
    *,
    activations: Any = None,
    weight_share: float | Sequence[float] | None = None,
    match: Literal["permute", "zip"] = "permute",
    reset_batchnorm: Any = None,
    weights: Sequence[float] | None = None,
    alignment: Any = None,
    reference_bugs: bool = False,
    **options: Any,
) -> MudscResult:
    """MuDSC: merge networks trained from different starts, by matching their units in weight and activation space.

    Args:
        models, spec, activations, weight_share, match, options: as in :func:`align`.
        reset_batchnorm: batches to re-estimate BatchNorm statistics with; default: `activations` when those are batches
            that can be iterated again; False leaves the averaged statistics (a warning says what that does).
        weights: of the models in the average; default equal.
        alignment: a saved Alignment to use instead of computing one.
        reference_bugs: the published code's head matching, scaling and counters.

    Returns: MudscResult; ``.model`` is a copy of models[0] with the merged tensors when modules were given.
    Raises: BadInput as align does.
    Source: MuDSC (arXiv:2403.01753); BatchNorm: REPAIR (arXiv:2211.08403).
    """
    models = list(models)
    batches = activations
    if activations is not None and not hasattr(activations, "sums") and iter(activations) is activations:
        batches = activations = list(activations)  # a generator: it is needed twice
    if alignment is None:
        alignment = align(
            models,
            spec,
            activations=activations,
            weight_share=weight_share,
            match=match,
            reference_bugs=reference_bugs,
            **options,
        )
    elif len(alignment.perms) != len(models):
        raise BadInput(
            f"the alignment is of {len(alignment.perms)} models, not {len(models)}",
            remedy="give the models it was made from, in the same order, or leave alignment= out",
        )
    states = [state_of(m, f"models[{i}]") for i, m in enumerate(models)]
    for i, s in enumerate(states):
        alignment.spec.check({k: v.shape for k, v in s.items()}, f"models[{i}]")
    with torch.no_grad():
        if hasattr(alignment, "merge"):
            state = alignment.merge(states, model_weights(weights, len(states)))
        else:
            state = average(states, alignment, weights, reference_bugs=reference_bugs)
    merged = None
    if isinstance(models[0], nn.Module):
        merged = copy.deepcopy(models[0])
        merged.load_state_dict(state)
    if has_batchnorm(state) and reset_batchnorm is not False:
        data = reset_batchnorm if reset_batchnorm is not None else None if hasattr(batches, "sums") else batches
        if merged is not None and data is not None:
            _reset(merged, data)
            state = {k: v.clone() for k, v in merged.state_dict().items()}
        else:
            warn_batchnorm("reset_batchnorm")
    return MudscResult(state, alignment, merged)


_reset = reset_batchnorm

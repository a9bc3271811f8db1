from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import BadInput
from ._method import Context, Header, Models, PerModel, TensorStream, Weight, method
from ._weights import SMALLEST

if TYPE_CHECKING:
    from ..structure import Alignment, PermutationSpec


@method(paper="arXiv:2403.01753", base="ignored", grain="tensor")
def mudsc(
    base: Weight | None,
    models: Models,
    *,
    weight: PerModel[float] = 1.0,
    architecture: str | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    context: Context,
) -> Weight:
    """Align the models to the first one by permutations found from the weights alone, then average them.

    `architecture` names the permutation spec (recognised by the names of the tensors when absent); `heads` and
    `kv_heads` are needed where neither shapes nor the first model's config.json tell them. BatchNorm statistics are
    averaged only: re-estimate them with data (fastmerge.mudsc does).
    """
    from ..ops import permute_merge

    plan: Alignment = context.plan
    weights = cast("list[float]", weight)
    total, merged = float(weights[0]), models[0]
    for m, other in enumerate(models[1:], 1):
        total += float(weights[m])
        spec, perms = plan.spec, plan.perms[m]
        indices: dict[int, Tensor] = {}
        if context.name in spec.tensors and spec.crossing(context.name):
            other = spec.permute(context.name, other, perms)
        else:
            indices = {a.axis: i for a in spec.tensors.get(context.name, ()) if (i := spec.index(a, perms)) is not None}
        last = m == len(models) - 1
        dtype = context.dtype if last else max(merged.dtype, other.dtype, key=lambda d: d.itemsize)
        share = float(weights[m]) / total if total else 0.0
        moved = permute_merge(merged, other, indices, share, dtype=dtype, check=False)
        assert isinstance(moved, Tensor)
        merged = moved
    return merged


def _spec(tensor: Header | TensorStream, state: Mapping[str, Tensor]) -> PermutationSpec:
    """The shipped spec for a state, as the parameters and the configuration of its first tensor say."""
    from ..structure import named_spec
    from ..structure.naming import heads_in_config

    p = tensor.parameters
    given = {k: p[k] for k in ("heads", "kv_heads") if p.get(k) is not None}
    return named_spec(p.get("architecture"), state, **{**heads_in_config(tensor.config), **given})


@mudsc.check
def _check(tensors: Sequence[Header]) -> None:
    for t in tensors:
        if len(t.models) != len(tensors[0].models):
            raise BadInput(
                f"tensor {t.name!r} merges {len(t.models)} models, others {len(tensors[0].models)}",
                remedy="name the same models for every tensor: a permutation spans the whole model",
            )
        _check_weights(t)
    if tensors:
        _spec(tensors[0], {t.name: torch.empty(t.shape, device="meta") for t in tensors})


def _check_weights(tensor: Header) -> None:
    """The average grows model by model, so that the weights so far must not cancel."""
    weights = tensor.parameters["weight"]
    for m in range(2, len(weights) + 1):
        cancel = abs(sum(weights[:m])) < SMALLEST
        if cancel and (m == len(weights) or any(weights[:m])):
            raise BadInput(
                f"the weights {list(weights[:m])} sum to 0", where=tensor.name, remedy="give weights above 0"
            )


@mudsc.memory
def _memory(tensors: Sequence[Header]) -> int:
    """All models at once, in their own dtypes at most float32."""
    return sum(4 * math.prod(t.shape) * len(t.models) for t in tensors)


@mudsc.fit
def _fit(tensors: Iterable[TensorStream], seed: int) -> Any:
    """The alignment of all models; reads every tensor once and holds them (a permutation group spans the model)."""
    from ..structure import align

    states: list[dict[str, Tensor]] = []
    first: TensorStream | None = None
    for t in tensors:
        _, models = t.read(0, t.numel)
        first = first or t
        states = states or [{} for _ in models]
        for state, x in zip(states, models, strict=True):
            state[t.name] = x.clone().view(t.shape)
    if first is None:
        return None  # nothing but integer buffers
    return align(states, _spec(first, states[0]), seed=seed)

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..errors import BadInput
from ._method import Context, Models, PerModel, TensorStream, Weight, method

if TYPE_CHECKING:
    from ..structure import Alignment


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
    `kv_heads` are needed where shapes do not tell them. BatchNorm statistics are averaged only: re-estimate them with
    data (fastmerge.mudsc does).
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


@mudsc.fit
def _fit(tensors: Iterable[TensorStream], seed: int) -> Any:
    """The alignment of all models; reads every tensor once and holds them (a permutation group spans the model)."""
    from ..structure import align, named_spec

    states: list[dict[str, Tensor]] = []
    options: dict[str, Any] = {}
    architecture: str | None = None
    for t in tensors:
        numel = 1
        for n in t.shape:
            numel *= n
        _, models = t.read(0, numel)
        if not states:
            states = [{} for _ in models]
            architecture = t.parameters.get("architecture")
            options = {k: t.parameters[k] for k in ("heads", "kv_heads") if t.parameters.get(k) is not None}
        if len(models) != len(states):
            raise BadInput(f"tensor {t.name!r} merges {len(models)} models, others {len(states)}")
        for state, x in zip(states, models, strict=True):
            state[t.name] = x.clone().view(t.shape)
    return align(states, named_spec(architecture, states[0], **options), seed=seed)

"""Pictures of an alignment: the objective per sweep, similarity blocks, and the loss on the way between two networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .alignment import Alignment
from .features import WeightFeatures
from .solve import matched_columns
from .units import units


def similarity_blocks(
    states: Sequence[Mapping[str, Tensor]], alignment: Alignment, *, model: int = 1, limit: int = 4
) -> dict[str, Tensor]:
    """{signature: [n, n]} weight similarity of the anchor's units with the aligned model's, the first `limit` units."""
    spec, out = alignment.spec, {}
    perms = alignment.perms[model]
    for unit in units(spec)[:limit]:
        features = WeightFeatures(spec, unit, states[0], states[model], "pearson")
        for signature, matrix in features.similarity(perms).items():
            out[" · ".join(signature)] = matrix[:, matched_columns(spec, signature, perms)]
    return out


def loss_between(
    states: Sequence[Mapping[str, Tensor]], alignment: Alignment, loss: Callable[[dict[str, Tensor]], float],
    *, model: int = 1, points: int = 11,
) -> tuple[list[float], list[float], list[float]]:  # fmt: skip
    """Loss along the straight line from the anchor to another model: (t, as it is, aligned)."""
    aligned = alignment.spec.permute_state(states[model], alignment.perms[model])
    ts = [i / (points - 1) for i in range(points)]

    def along(other: Mapping[str, Tensor]) -> list[float]:
        return [
            float(
                loss(
                    {
                        n: a if not a.is_floating_point() else torch.lerp(a, other[n].to(a), t)
                        for n, a in states[0].items()
                    }
                )
            )
            for t in ts
        ]

    return ts, along(states[model]), along(aligned)


def plot(
    alignment: Any,
    path: str | Path,
    *,
    states: Sequence[Mapping[str, Tensor]] | None = None,
    loss: Callable[[dict[str, Tensor]], float] | None = None,
    model: int = 1,
) -> Path:
    """Draws the trace; with `states` also similarity heat maps; with `loss` too the loss between the two networks.

    Raises BadInput when matplotlib is not installed (``pip install fastmerge[plot]``).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("plots need matplotlib", remedy="pip install 'fastmerge[plot]'") from error
    blocks = similarity_blocks(states, alignment, model=model) if states is not None and alignment.perms[model] else {}
    panels = 1 + len(blocks) + (loss is not None and states is not None)
    columns = min(panels, 3)
    figure = Figure(figsize=(4.2 * columns, 3.4 * -(-panels // columns)), layout="constrained")
    axes = iter(figure.subplots(-(-panels // columns), columns, squeeze=False).flat)
    ax = next(axes)
    trace = alignment.trace[model]
    ax.plot([s.number for s in trace], [s.objective for s in trace], color="0.6", lw=1)
    for accepted, colour, label in ((True, "tab:blue", "accepted"), (False, "tab:red", "undone")):
        chosen = [s for s in trace if s.accepted == accepted]
        if chosen:
            ax.plot([s.number for s in chosen], [s.objective for s in chosen], "o", color=colour, label=label)
    ax.set(xlabel="sweep", ylabel="mean matched similarity", title="objective")
    ax.legend(frameon=False)
    for name, block in blocks.items():
        ax = next(axes)
        limit = max(float(block.abs().max()), 1e-6)  # similarities of unlike networks are small: show their own range
        image = ax.imshow(block.numpy(), vmin=-limit, vmax=limit, cmap="RdBu_r", interpolation="nearest")
        ax.set(title=name[:40], xlabel="aligned model", ylabel="anchor")
        figure.colorbar(image, ax=ax, shrink=0.8)
    if loss is not None and states is not None:
        ts, raw, aligned = loss_between(states, alignment, loss, model=model)
        ax = next(axes)
        ax.plot(ts, raw, "o-", label="as it is")
        ax.plot(ts, aligned, "o-", label="aligned")
        ax.set(xlabel="from the anchor to the other network", ylabel="loss", title="between the two")
        ax.legend(frameon=False)
    for ax in axes:
        ax.set_visible(False)
    figure.savefig(path, dpi=100)
    return Path(path)

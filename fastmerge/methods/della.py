from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from torch import Tensor

from .. import ops
from ..errors import BadInput
from ..ops.rescale import L1Stream
from ._method import Context, Density, Header, PerModel, Range, TensorStream, method

Epsilon = Annotated[float, Range(0.0, 1.0)]


def _merge(tensor: TensorStream, context: Context, elect: Literal["sum"] | None, **p: Any) -> None:
    """Ranks need whole rows, so that chunks are whole rows too."""
    row = tensor.shape[-1] if len(tensor.shape) >= 2 else tensor.numel
    trim: dict[str, Any] = {"trim": "rank_random", "density": p["density"], "epsilon": p["epsilon"]}
    trim |= {"seed": context.seed, "name": tensor.name}
    factors = None
    if p["rescale"] and p["rescale_norm"] == "l1":
        sums = L1Stream(**trim)
        tensor.for_each(
            lambda offset, base, models: sums.feed(_rows(base, row), [m.view(-1, row) for m in models], offset),
            align=row,
        )
        factors = sums.finish()

    def merge(offset: int, base: Tensor | None, models: list[Tensor], out: Tensor | None) -> Tensor:
        merged: Tensor = ops.consensus_merge(
            _rows(base, row), [m.view(-1, row) for m in models], p["weight"],
            elect=elect, normalize=p["normalize"], factors=factors, scale=p["lambda_"], offset=offset, dtype=context.dtype,
            rescale="density" if p["rescale"] and p["rescale_norm"] == "density" else None, **trim,
        )  # fmt: skip
        return merged

    tensor.merge_each(merge, align=row)


def _rows(base: Tensor | None, row: int) -> Tensor:
    assert base is not None
    return base.view(-1, row)


@method(paper="arXiv:2406.11617", grain="stream")
def della(
    tensor: TensorStream,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = 1.0,
    epsilon: PerModel[Epsilon] = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    rescale_norm: Literal["l1", "density"] = "l1",
    lambda_: float = 1.0,
    context: Context,
) -> None:
    """DELLA: keep delta elements with a probability that grows with their rank in the row, rescale, elect signs, merge.

    Probabilities run from density − epsilon for a row's smallest to density + epsilon for its largest.
    """
    _merge(
        tensor, context, "sum", weight=weight, density=density, epsilon=epsilon, normalize=normalize,
        rescale=rescale, rescale_norm=rescale_norm, lambda_=lambda_,
    )  # fmt: skip


@method(paper="arXiv:2406.11617", grain="stream")
def della_linear(
    tensor: TensorStream,
    *,
    weight: PerModel[float],
    density: PerModel[Density] = 1.0,
    epsilon: PerModel[Epsilon] = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    rescale_norm: Literal["l1", "density"] = "l1",
    lambda_: float = 1.0,
    context: Context,
) -> None:
    """DELLA without sign election: the weighted sum of what is kept."""
    _merge(
        tensor, context, None, weight=weight, density=density, epsilon=epsilon, normalize=normalize,
        rescale=rescale, rescale_norm=rescale_norm, lambda_=lambda_,
    )  # fmt: skip


@della.check
@della_linear.check
def _check(tensors: Sequence[Header]) -> None:
    for tensor in tensors:
        for d, e in zip(tensor.parameters["density"], tensor.parameters["epsilon"], strict=True):
            if 0 < d < 1 and not (d - e > 0 and d + e < 1):
                raise BadInput(
                    f"density {d} ± epsilon {e} must lie strictly inside (0, 1)",
                    where=tensor.name,
                    remedy="lower epsilon",
                )

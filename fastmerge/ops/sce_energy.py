"""sce_energy: sums of squares of the deltas that SCE selects, by blocks, from which it weighs the models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import float_deltas, require_family
from .gram_blocks import BLOCK, LANES
from .sce_variance import family_case, special_case, variance_of
from .threshold import KEEP_NONE, Threshold, kept, native_arrays


def native_rule(rule: Threshold | None) -> tuple[bool, int, int]:
    """(whether anything is left out, key, index) as the native kernels take them."""
    return (False, 0, 0) if rule is None else (True, rule.key, rule.index)


def _check(base: Tensor, models: Sequence[Tensor], offset: int) -> None:
    require_family("sce_energy", base, models)
    if offset < 0 or offset % BLOCK:
        raise ValueError(f"sce_energy: offset {offset} is not a multiple of {BLOCK}")


@op(numerics="B", kind="reduction")
def sce_energy(base: Tensor, models: Sequence[Tensor], rule: Threshold | None = None, *, offset: int = 0) -> Tensor:
    """Sums of squared deltas over blocks of 65536 elements, of the elements whose variance a rule keeps.

    ``out[b, i] = Σ δᵢ²`` over the elements of block b with a kept :func:`sce_variance`, δᵢ = modelᵢ − base.

    Args:
        base: [...] any shape. models: K >= 1 tensors of its shape; dtypes may differ.
        rule: of the variance, as :func:`topk_thresholds` gives it; None keeps all.
        offset: flat index of the first element within the whole tensor, a multiple of 65536.

    Returns: float64 [ceil(N / 65536), K] on the CPU.
    Numerics: class B, and the same bits on the CPU as the reference: variance and deltas as :func:`sce_variance`, products
        and sums in float64, 16 lanes in element order, then the lanes in order.
    Cost: K + 1 reads of N elements, about 8KN flops, no workspace.
    Raises: TypeError for non-float tensors, ValueError for an empty list, shapes that differ or an offset inside a block.
    Source: SCE (arXiv:2408.07990), §3.3.
    """
    _check(base, models, offset)
    deltas = float_deltas(base, models)
    chosen = kept(variance_of(deltas), rule, offset) if rule is not None else None
    blocks = -(-base.numel() // BLOCK)
    out = torch.empty((blocks, len(models)), dtype=torch.float64, device="cpu")
    for i, d in enumerate(deltas):
        part = d if chosen is None else torch.where(chosen, d, 0.0)
        padded = torch.zeros(blocks * BLOCK, dtype=torch.float64, device=d.device)
        padded[: d.numel()] = part.reshape(-1)
        lanes = padded.view(blocks, BLOCK // LANES, LANES)
        out[:, i] = (lanes * lanes).cumsum(1)[:, -1].cumsum(1)[:, -1]
    return out


@sce_energy.backend("cpu", when=lambda base, models, *_, **__: _native.cpu_why_not(base, *models))
def _sce_energy_cpu(
    base: Tensor, models: Sequence[Tensor], rule: Threshold | None = None, *, offset: int = 0
) -> Tensor:
    _check(base, models, offset)
    arrays = native_arrays(base, models)
    out = torch.empty((-(-arrays.n // BLOCK), len(models)), dtype=torch.float64, device="cpu")
    _native.lib().sce_energy(out.data_ptr(), *arrays.arguments, arrays.n, *native_rule(rule), offset, _native.threads())
    return out


@sce_energy.case("all, ragged end")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (2 * BLOCK + 7,), 2), {}


@sce_energy.case("selected, two blocks of a later part")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, models = family_case(g, dtype, (301, 257), 3)
    return (base, models, median_rule(base, models, 3 * BLOCK)), {"offset": 3 * BLOCK}


@sce_energy.case("none", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (100,), 2), KEEP_NONE), {}


@sce_energy.case("special values", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*special_case(dtype), Threshold(0, 5)), {}


@sce_energy.case("empty", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (0, 3), 2), {}


def median_rule(base: Tensor, models: Sequence[Tensor], offset: int) -> Threshold:
    """A rule that keeps half of the elements and splits the ties of its key."""
    from .threshold import topk_thresholds

    (rule,) = topk_thresholds(None, [variance_of(float_deltas(base, models))], 0.5)
    assert isinstance(rule, Threshold)
    return rule.shifted(-offset)

"""ram_counts: of the elements that each model changed, how many it alone changed and how many others changed too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import float_deltas, require_family
from .gram_blocks import BLOCK
from .sce_variance import family_case, special_case
from .threshold import native_arrays


def check_epsilon(op_name: str, base: Tensor, models: Sequence[Tensor], epsilon: float) -> None:
    """The checks of RAM's operators."""
    require_family(op_name, base, models)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"{op_name}: epsilon {epsilon} must be finite and >= 0")


def changed_by(deltas: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """(per model, where |δ| > epsilon; how many models that is, int16)."""
    changed = [d.abs() > epsilon for d in deltas]
    count = changed[0].to(torch.int16)
    for c in changed[1:]:
        count = count + c
    return changed, count


@op(numerics="A", kind="reduction")
def ram_counts(base: Tensor, models: Sequence[Tensor], epsilon: float = 1e-5) -> Tensor:
    """Per model, the number of elements that it alone changed, and of those that it and others changed.

    Model i changed an element where ``|modelᵢ − base| > epsilon``.

    Args:
        base: [...] any shape. models: K >= 1 tensors of its shape; dtypes may differ. epsilon: >= 0.

    Returns: int64 [K, 2] on the CPU: (alone, shared).
    Numerics: class A: differences in float32 (float64 when an input is), integer counts.
    Cost: K + 1 reads of N elements, about 6KN operations, no workspace.
    Raises: TypeError for non-float tensors; ValueError for an empty list, shapes that differ or a negative epsilon.
    Source: RAM and RAM+, as mergekit's ram and ramplus_tl.
    """
    check_epsilon("ram_counts", base, models, epsilon)
    changed, count = changed_by(float_deltas(base, models), epsilon)
    alone = count == 1
    return torch.stack([torch.stack([(c & alone).sum(), (c & ~alone).sum()]) for c in changed]).cpu()


@ram_counts.backend("cpu", when=lambda base, models, *_, **__: _native.cpu_why_not(base, *models))
def _ram_counts_cpu(base: Tensor, models: Sequence[Tensor], epsilon: float = 1e-5) -> Tensor:
    check_epsilon("ram_counts", base, models, epsilon)
    arrays = native_arrays(base, models)
    counts = torch.empty((-(-arrays.n // BLOCK), len(models), 2), dtype=torch.int64, device="cpu")
    _native.lib().ram_counts(counts.data_ptr(), *arrays.arguments, arrays.n, epsilon, _native.threads())
    return counts.sum(0)


@ram_counts.case("three models, more than a block")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (301, 257), 3), 0.05), {}


@ram_counts.case("special values, nothing too small")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*special_case(dtype), 0.0), {}


@ram_counts.case("one model", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (77,), 1), {}


@ram_counts.case("empty", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (0, 3), 2), {}


@ram_counts.case("0-d", torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (), 2), {}

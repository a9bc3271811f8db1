"""arcee_merge: Arcee Fusion's last step: take the important elements from the other model, keep the base elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, result_like
from .arcee_divergence import native_pair
from .arcee_importance import check_lines, importance_of, pair_case, special_pair


@op(numerics="A", kind="elementwise")
def arcee_merge(
    base: Tensor,
    other: Tensor,
    divergence: Tensor,
    threshold: float,
    *,
    row: int | None = None,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The base, with the deltas of the elements that matter: ``out = base + δ where |δ| · divergence >= threshold``.

    Args:
        base, other: [...] any shape, or a flat piece of a tensor; dtypes may differ. δ = other − base.
        divergence, row, offset: as for :func:`arcee_importance`.
        threshold: importance from which a delta is kept, rounded to the compute dtype. NaN keeps nothing.
        dtype: of the result; default: base's. out: filled and returned when given (it may be one of the inputs).

    Numerics: class A: float32 (float64 when an input is), rounded once at the end. An importance of NaN is not kept.
    Cost: two reads and one write of N elements, 3N flops, no workspace.
    Raises: TypeError for non-float tensors or a divergence of another dtype; ValueError for shapes that differ or rows
        without a divergence.
    Source: Arcee Fusion, as in mergekit's arcee_fusion.
    """
    length = check_lines("arcee_merge", base, other, divergence, row, offset)
    result = result_like("arcee_merge", base, dtype, out)
    wide = compute_dtype(base, other)
    delta = other.to(wide) - base.to(wide)
    limit = torch.tensor(threshold, dtype=wide, device=delta.device)
    kept = importance_of(delta, divergence, length, offset) >= limit
    return result.copy_(base.to(wide) + torch.where(kept, delta, 0.0))


@arcee_merge.backend("cpu", when=lambda base, other, *_, **__: _native.cpu_why_not(base, other))
def _arcee_merge_cpu(
    base: Tensor,
    other: Tensor,
    divergence: Tensor,
    threshold: float,
    *,
    row: int | None = None,
    offset: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    length = check_lines("arcee_merge", base, other, divergence, row, offset)
    result = result_like("arcee_merge", base, dtype, out)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
    _inputs, arrays = native_pair(base, other)
    lines = divergence.resolve_neg().contiguous()
    _native.lib().arcee_merge(
        dense.data_ptr(), _native.DTYPES[dense.dtype], *arrays, dense.numel(), lines.data_ptr(), float(threshold),
        length, offset, _native.threads(),
    )  # fmt: skip
    return dense if dense is result else result.copy_(dense)


@arcee_merge.case("odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*pair_case(g, dtype, (131, 257), 131), 0.05), {}


@arcee_merge.case("a piece from the middle of rows, another dtype out")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*pair_case(g, dtype, (3000,), 60), 0.02), {"row": 70, "offset": 111, "dtype": torch.float16}


@arcee_merge.case("special values, everything that is a number")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*special_pair(dtype), 0.0), {}


@arcee_merge.case("empty", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*pair_case(g, dtype, (0, 3), 0), 0.1), {}


@arcee_merge.case("0-d, nothing kept", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*pair_case(g, dtype, (), 1), float("inf")), {}

"""line_merge: a weighted sum of K matrices with weights of its own for every row, or every column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, result_like
from .line_gram import LINES, check_matrices, wide_deltas
from .sce_variance import family_case
from .threshold import native_arrays


def _check(base: Tensor | None, models: Sequence[Tensor], weight: Tensor, along: str) -> Tensor:
    """The weights in the compute dtype, dense; raises as the operator says."""
    check_matrices("line_merge", base, models, along)
    wanted = len(models), models[0].shape[LINES.index(along)]
    if tuple(weight.shape) != wanted:
        raise ValueError(f"line_merge: weight has shape {tuple(weight.shape)}, expected {wanted} (models, {along})")
    return weight.to(compute_dtype(*models, *([] if base is None else [base]))).resolve_neg().contiguous()


@op(numerics="A", kind="elementwise")
def line_merge(
    base: Tensor | None,
    models: Sequence[Tensor],
    weight: Tensor,
    *,
    along: str = "rows",
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Add deltas to a base with weights that differ from row to row, or from column to column.

    ``out[r, c] = base[r, c] + Σᵢ weight[i, r] · δᵢ[r, c]`` with δᵢ = modelᵢ − base; ``weight[i, c]`` along columns.
    Without a base ``Σᵢ weight[i, r] · modelᵢ[r, c]``.

    Args:
        base: [rows, columns], or None. models: K >= 1 matrices of its shape; dtypes may differ.
        weight: [K, rows], or [K, columns]; any float dtype, rounded once to the compute dtype.
        along: "rows" or "columns": what has weights of its own.
        dtype: of the result; default: base's, or the first model's. out: filled and returned when given (it may be one of
            the inputs).

    Numerics: class A. float32 (float64 when an input is), models in list order, rounded once at the end.
    Cost: K + 1 reads and one write of N elements, 3KN flops, no workspace.
    Raises: TypeError for non-float tensors; ValueError for an empty list, shapes that differ or are no matrices, weights
        of another shape, or another name in `along`.
    """
    wide = _check(base, models, weight, along)
    result = result_like("line_merge", base if base is not None else models[0], dtype, out)
    lines = [w.unsqueeze(1 if along == "rows" else 0) for w in wide]
    deltas = wide_deltas(base, models)
    total = deltas[0] * lines[0]
    for d, w in zip(deltas[1:], lines[1:], strict=True):
        total = total + d * w
    return result.copy_(total if base is None else base.to(wide.dtype) + total)


@line_merge.backend(
    "cpu", when=lambda base, models, *_, **__: _native.cpu_why_not(*models, *([] if base is None else [base]))
)
def _line_merge_cpu(
    base: Tensor | None,
    models: Sequence[Tensor],
    weight: Tensor,
    *,
    along: str = "rows",
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    wide = _check(base, models, weight, along)
    result = result_like("line_merge", base if base is not None else models[0], dtype, out)
    dense = result if result.is_contiguous() else torch.empty(result.shape, dtype=result.dtype, device="cpu")
    arrays = native_arrays(base, models)
    _native.lib().line_merge(
        dense.data_ptr(), _native.DTYPES[dense.dtype], *arrays.arguments, wide.data_ptr(), *models[0].shape,
        LINES.index(along), _native.threads(),
    )  # fmt: skip
    return dense if dense is result else result.copy_(dense)


def _weights(g: torch.Generator, count: int, lines: int) -> Tensor:
    return torch.randn((count, lines), generator=g, dtype=torch.float64)


@line_merge.case("rows of an odd length")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (131, 257), 3), _weights(g, 3, 131)), {}


@line_merge.case("very short rows, no base, another dtype out", torch.bfloat16, torch.float64)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, family_case(g, dtype, (901, 3), 2)[1], _weights(g, 2, 901)), {"dtype": torch.float16}


@line_merge.case("columns")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (37, 1100), 2), _weights(g, 2, 1100)), {"along": "columns"}


@line_merge.case("columns, no base")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, family_case(g, dtype, (700, 5), 2)[1], _weights(g, 2, 5)), {"along": "columns"}


@line_merge.case("no rows", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (*family_case(g, dtype, (0, 3), 2), _weights(g, 2, 0)), {}

"""line_gram: inner products of K matrices' rows, or of their columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, require_float, require_like
from .gram_blocks import LANES, pairs
from .sce_variance import family_case
from .threshold import native_arrays

LINES = ("rows", "columns")


def check_matrices(op_name: str, base: Tensor | None, models: Sequence[Tensor], along: str) -> None:
    """Raises unless there is a model, all are float matrices of one shape, and `along` is "rows" or "columns"."""
    if not models:
        raise ValueError(f"{op_name}: models is empty")
    if base is not None:
        require_float(op_name, base=base)
    require_like(op_name, base if base is not None else models[0], models)
    if models[0].ndim != 2:
        raise ValueError(f"{op_name}: models[0] has shape {tuple(models[0].shape)}, a matrix is needed")
    if along not in LINES:
        raise ValueError(f"{op_name}: along {along!r} is neither 'rows' nor 'columns'")


def wide_deltas(base: Tensor | None, models: Sequence[Tensor]) -> list[Tensor]:
    """The deltas (the models without a base) in float32, or float64 when an input is."""
    wide = compute_dtype(*models, *([] if base is None else [base]))
    return [m.to(wide) if base is None else m.to(wide) - base.to(wide) for m in models]


@op(numerics="B", kind="reduction")
def line_gram(base: Tensor | None, models: Sequence[Tensor], *, along: str = "rows") -> Tensor:
    """Inner products of deltas along each row, or each column, of matrices.

    ``out[r, p] = Σ_c δᵢ[r, c] δⱼ[r, c]`` for the p-th pair (i, j), i <= j, in the order (0, 0), (0, 1), ..., with
    δᵢ = modelᵢ − base, or the model itself without a base; along columns ``out[c, p] = Σ_r δᵢ[r, c] δⱼ[r, c]``.

    Args:
        base: [rows, columns], or None. models: K >= 1 matrices of its shape; dtypes may differ.
        along: "rows" or "columns".

    Returns: float64 [lines, K (K + 1) / 2], lines being rows or columns.
    Numerics: class B, and the same bits on the CPU as the reference: deltas in float32 (float64 when an input is),
        products and sums in float64; along rows 16 lanes in element order, then the lanes in order, along columns
        row by row.
    Cost: K + 1 reads, K² flops an element; along columns 8 K² bytes of workspace for each of 1024 columns.
    Raises: TypeError for non-float tensors; ValueError for an empty list, shapes that differ or are no matrices, or
        another name in `along`.
    """
    check_matrices("line_gram", base, models, along)
    deltas = [d.double() for d in wide_deltas(base, models)]
    rows, columns = deltas[0].shape
    out = deltas[0].new_zeros((rows if along == "rows" else columns, len(pairs(len(deltas)))))
    if models[0].numel() == 0:
        return out
    if along == "rows":
        deltas = [torch.nn.functional.pad(d, (0, -columns % LANES)).view(rows, -1, LANES) for d in deltas]
    for p, (i, j) in enumerate(pairs(len(deltas))):
        if along == "rows":
            out[:, p] = (deltas[i] * deltas[j]).cumsum(1)[:, -1].cumsum(1)[:, -1]
        else:
            out[:, p] = (deltas[i] * deltas[j]).cumsum(0)[-1]
    return out


@line_gram.backend(
    "cpu", when=lambda base, models, **_: _native.cpu_why_not(*models, *([] if base is None else [base]))
)
def _line_gram_cpu(base: Tensor | None, models: Sequence[Tensor], *, along: str = "rows") -> Tensor:
    check_matrices("line_gram", base, models, along)
    rows, columns = models[0].shape
    shape = rows if along == "rows" else columns, len(pairs(len(models)))
    if rows * columns == 0:
        return torch.zeros(shape, dtype=torch.float64, device="cpu")
    arrays = native_arrays(base, models)
    out = torch.empty(shape, dtype=torch.float64, device="cpu")
    _native.lib().line_gram(out.data_ptr(), *arrays.arguments, rows, columns, LINES.index(along), _native.threads())
    return out


@line_gram.case("rows of an odd length")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (60, 257), 3), {}


@line_gram.case("rows longer than a tile, no base")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, family_case(g, dtype, (3, 2100), 2)[1]), {}


@line_gram.case("very short rows")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (901, 3), 2), {}


@line_gram.case("columns")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (37, 1100), 3), {"along": "columns"}


@line_gram.case("one column, no base")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, family_case(g, dtype, (300, 1), 2)[1]), {"along": "columns"}


@line_gram.case("no rows", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (0, 3), 2), {"along": "columns"}


@line_gram.case("no rows, along them", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return family_case(g, dtype, (0, 3), 2), {}

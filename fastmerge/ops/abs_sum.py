"""abs_sum: sums of absolute differences by blocks, the E|v| of FR-Merging in any chunking."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import op
from ._checks import compute_dtype, require_float, require_like

BLOCK = 65536  # elements of one sum: chunks that begin at multiples of it give the sums of the whole


def _prepare(base: Tensor | None, models: Sequence[Tensor]) -> None:
    if not models:
        raise ValueError("abs_sum: models is empty")
    if base is not None:
        require_float("abs_sum", base=base)
    require_like("abs_sum", base if base is not None else models[0], models)


@op(numerics="B", kind="reduction")
def abs_sum(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """Sums of |modelᵢ − base| (of |modelᵢ| without a base) over blocks of 65536 elements.

    Args:
        base: [...] any shape, or None.
        models: K >= 1 tensors of base's shape; dtypes may differ.

    Returns: float64 [K, ceil(N / 65536)], on the CPU. Added up in index order they give the same total for every
        chunking of a tensor into pieces that begin at multiples of 65536 elements.
    Numerics: class B. Differences in float32 (float64 when an input is), sums in float64 in a fixed order.
    Cost: K + 1 reads of N elements, 3KN flops.
    Raises: TypeError, ValueError for no model, non-float tensors, shapes or devices that differ.
    Source: E(v) of FREE-Merging (arXiv:2411.16815), eq. 6.
    """
    _prepare(base, models)
    compute = compute_dtype(*models, *([] if base is None else [base]))
    rows = []
    for m in models:
        x = m.to(compute).reshape(-1)
        difference = x if base is None else x - base.to(compute).reshape(-1)
        padded = torch.nn.functional.pad(difference.abs().double(), (0, -x.numel() % BLOCK))
        rows.append(padded.view(-1, BLOCK).sum(1))
    return torch.stack(rows).cpu()


@abs_sum.backend("cpu", when=lambda base, models: _native.cpu_why_not(*models, *([] if base is None else [base])))
def _abs_sum_cpu(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    _prepare(base, models)
    tensors = [t.contiguous() for t in ([] if base is None else [base]) + list(models)]
    blocks = -(-tensors[0].numel() // BLOCK)
    sums = torch.empty(len(models), blocks, dtype=torch.float64, device="cpu")
    _native.lib().abs_sum(
        sums.data_ptr(),
        [t.data_ptr() for t in tensors],
        [_native.DTYPES[t.dtype] for t in tensors],
        tensors[0].numel(),
        base is not None,
        _native.threads(),
    )
    return sums


@abs_sum.backend("triton", when=lambda base, models: _triton.why_not(base, *models))
def _abs_sum_triton(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    _prepare(base, models)
    sums: Tensor = _triton.kernel("abs_sum")(base, models)
    return sums.cpu()


@abs_sum.case("deltas of three models, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, *models = (torch.randn(501, 277, generator=g).to(dtype) for _ in range(4))
    return (base, models), {}


@abs_sum.case("no base, mixed dtypes")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, [torch.randn(65536, generator=g).to(dtype), torch.randn(65536, generator=g)]), {}


@abs_sum.case("empty, and a single element", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.zeros(0, 3, dtype=dtype), [torch.zeros(0, 3, dtype=dtype)]), {}


@abs_sum.case("0-d", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (torch.tensor(1.5, dtype=dtype), [torch.tensor(-2.0, dtype=dtype)]), {}


@abs_sum.case("NaN and Inf", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x = torch.randn(3, 70000, generator=g).to(dtype)
    x[1, 66000], x[2, 5] = float("nan"), float("inf")
    return (x[0], [x[1], x[2]]), {}

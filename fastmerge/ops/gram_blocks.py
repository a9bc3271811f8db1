"""gram_blocks: all inner products of K tensors (or of their deltas) in one pass, streamed or whole with the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from .._dispatch import _from_foreign, op
from ._checks import require_float, require_like

BLOCK = 65_536  # elements whose products are summed together; blocks begin at multiples of it
LANES = 16


def _check(base: Tensor | None, models: Sequence[Tensor]) -> None:
    if not models:
        raise ValueError("gram_blocks: models is empty")
    if base is not None:
        require_float("gram_blocks", base=base)
    require_like("gram_blocks", base if base is not None else models[0], models)


def pairs(count: int) -> list[tuple[int, int]]:
    """(i, j), i <= j, in the order of a block's sums."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def total(sums: Tensor, count: int) -> Tensor:
    """The symmetric [K, K] float64 matrix of block sums [blocks, pairs], added in block order."""
    flat = sums.cumsum(0)[-1] if len(sums) else sums.new_zeros(len(pairs(count)))
    out = torch.empty((count, count), dtype=torch.float64, device="cpu")
    for value, (i, j) in zip(flat.tolist(), pairs(count), strict=True):
        out[i, j] = out[j, i] = value
    return out


@op(numerics="B", kind="reduction")
def gram_blocks(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """Inner products of deltas, per block of 65536 elements: what a stream adds up to :func:`gram`.

    ``out[b, p] = Σ δᵢ δⱼ`` over block b for the p-th pair (i, j), i <= j (:func:`pairs`), δᵢ = modelᵢ − base, or the
    model itself without a base.

    Args:
        base: [...] any shape, or None. models: K >= 1 tensors of its shape; dtypes may differ.

    Returns: float64 [ceil(N / 65536), K (K + 1) / 2] on the CPU.
    Numerics: class B, and the same bits on the CPU as the reference: deltas in float32 (float64 when an input is),
        products and sums in float64, 16 lanes in element order, then the lanes in order.
    Cost: K + 1 reads, K² N flops, no workspace. Raises: TypeError, ValueError as :func:`weighted_sum`.
    """
    _check(base, models)
    wide = (
        torch.float64
        if any(t.dtype == torch.float64 for t in [*models, *([] if base is None else [base])])
        else torch.float32
    )
    blocks = -(-models[0].numel() // BLOCK)
    lanes = []
    for m in models:
        delta = m.to(wide) if base is None else m.to(wide) - base.to(wide)
        padded = torch.zeros(blocks * BLOCK, dtype=torch.float64, device=m.device)
        padded[: m.numel()] = delta.reshape(-1)
        lanes.append(padded.view(blocks, BLOCK // LANES, LANES))
    out = torch.empty((blocks, len(pairs(len(models)))), dtype=torch.float64, device="cpu")
    for p, (i, j) in enumerate(pairs(len(models))):
        out[:, p] = (lanes[i] * lanes[j]).cumsum(1)[:, -1].cumsum(1)[:, -1]
    return out


@gram_blocks.backend("cpu", when=lambda base, models: _native.cpu_why_not(*models, *([] if base is None else [base])))
def _gram_blocks_cpu(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    _check(base, models)
    n = models[0].numel()
    inputs = [t.contiguous() for t in ([] if base is None else [base]) + list(models)]
    out = torch.empty((-(-n // BLOCK), len(pairs(len(models)))), dtype=torch.float64, device="cpu")
    _native.lib().gram_blocks(
        out.data_ptr(),
        [t.data_ptr() for t in inputs],
        [_native.DTYPES[t.dtype] for t in inputs],
        n,
        base is not None,
        _native.threads(),
    )
    return out


def gram(base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
    """All inner products ⟨δᵢ, δⱼ⟩ of K deltas (of the models without a base): float64 [K, K].

    Cost, numerics and errors as :func:`gram_blocks`; blocks are added in order, so a streamed sum has the same bits.
    """
    return total(gram_blocks(_from_foreign(base), _from_foreign(models)), len(models))


@gram_blocks.case("three deltas over two blocks")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base, *models = (torch.randn(301, 257, generator=g).to(dtype) for _ in range(4))
    return (base, models), {}


@gram_blocks.case("models without a base, ragged end")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, [torch.randn(65_536 * 2 + 7, generator=g).to(dtype) for _ in range(2)]), {}


@gram_blocks.case("0-d")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, [torch.randn((), generator=g).to(dtype)]), {}


@gram_blocks.case("empty")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, [torch.zeros(0, 3, dtype=dtype)] * 2), {}

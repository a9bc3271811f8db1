"""fw_products: inner products of one gradient with K candidates, and all norms, in one pass and in any chunking."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _cuda, _native
from .._dispatch import op
from . import _fw_cuda
from ._checks import compute_dtype, require_float, require_like

BLOCK = 65536  # elements summed in float32 before a partial sum is added to a float64 total


class FwProducts(NamedTuple):
    """Sums over the elements seen so far, float64."""

    dots: Tensor  # [K] <g, s_k>
    sqnorms: Tensor  # [K] |s_k|²; NaN when they were not asked for
    grad_sqnorm: Tensor  # [] |g|²


def prepare(gradient: Tensor, candidates: Sequence[Tensor], carry: FwProducts | None) -> None:
    if not candidates:
        raise ValueError("fw_products: candidates is empty")
    require_float("fw_products", gradient=gradient)
    require_like("fw_products", gradient, candidates, "candidates")
    if carry is not None and carry.dots.shape != (len(candidates),):
        raise ValueError(f"fw_products: carry is of {carry.dots.numel()} candidates, expected {len(candidates)}")


def block_sums(x: Tensor) -> Tensor:
    """[ceil(n / 65536)] sums of blocks: pairs are added in a fixed tree, whatever the number of threads."""
    blocks = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    while blocks.shape[1] > 1:
        blocks = blocks[:, ::2] + blocks[:, 1::2]
    return blocks.view(-1)


def total(x: Tensor, start: float = 0.0) -> float:
    """`start` plus the block sums of x, added in index order in float64."""
    for s in block_sums(x).tolist():
        start += s
    return start


@op(numerics="B", kind="reduction32")
def fw_products(
    gradient: Tensor, candidates: Sequence[Tensor], *, norms: bool = True, carry: FwProducts | None = None
) -> FwProducts:
    """The products a Frank-Wolfe step needs of one tensor: ⟨g, s_k⟩, ‖s_k‖² and ‖g‖² for K candidates.

    A tensor may be fed in pieces: ``carry`` is the result so far, and pieces that start at multiples of 65536 elements
    give the same bits as the whole tensor at once.

    Args:
        gradient: [...] any shape.
        candidates: K >= 1 tensors of its shape and device; dtypes may differ.
        norms: False leaves ‖s_k‖² out (NaN) where it is known already.
        carry: sums over the elements before these.

    Numerics: class B. Products and sums over blocks of 65536 elements in float32 (float64 when an input is) in a fixed
        order; block sums are added to float64 totals in index order.
    Cost: gradient and candidates are read once; (4K + 2)·N flops with norms.
    Raises: TypeError, ValueError for no candidate, non-float tensors, shapes or devices that differ.
    Source: FW-Merging (arXiv:2503.12649), alg. 1 (linear minimisation oracle).
    """
    prepare(gradient, candidates, carry)
    compute = compute_dtype(gradient, *candidates)
    g = gradient.to(compute)
    if carry is None:
        carry = FwProducts(
            torch.zeros(len(candidates), dtype=torch.float64, device="cpu"),
            torch.full((len(candidates),), 0.0 if norms else float("nan"), dtype=torch.float64, device="cpu"),
            torch.zeros((), dtype=torch.float64, device="cpu"),
        )
    dots = [total(g * s.to(compute), t) for s, t in zip(candidates, carry.dots.tolist(), strict=True)]
    squares = carry.sqnorms.tolist()
    if norms:
        squares = [total(s.to(compute).square(), t) for s, t in zip(candidates, squares, strict=True)]
    return FwProducts(
        torch.tensor(dots, dtype=torch.float64, device=gradient.device),
        torch.tensor(squares, dtype=torch.float64, device=gradient.device),
        torch.tensor(total(g * g, carry.grad_sqnorm.item()), dtype=torch.float64, device=gradient.device),
    )


class Piece(NamedTuple):
    """Elements of a tensor that lie in a file."""

    fd: int
    position: int  # bytes from the file's beginning
    dtype: torch.dtype


class ReadFailed(OSError):
    """A piece could not be read; errno is None where the file ends too early."""

    def __init__(self, error: int, tensor: int, candidate: int) -> None:
        super().__init__(error if error > 0 else None, "the file became shorter while it was read")
        if error > 0:
            self.strerror = os.strerror(error)
        self.tensor, self.candidate = tensor, candidate


def native(
    gradients: Sequence[Tensor],
    candidates: Sequence[Sequence[Tensor | Piece]],
    norms: bool | Sequence[bool],
    totals: Tensor,
) -> Tensor:
    """Adds the products of L tensors to `totals` [L, 2K + 1] (dots, squares, |g|²) and returns it.

    A candidate's tensor may be a :class:`Piece` of a file, which is read block by block as it is reduced: the same
    bits, and the same reads from memory, as if it were there already. Raises ReadFailed.
    """
    flat = [g.contiguous() for g in gradients]
    rows = [
        [t if isinstance(t, Piece) else t.contiguous() for t in (s[n] for s in candidates)] for n in range(len(flat))
    ]
    error, tensor, candidate = _native.lib().fw_products(
        totals.data_ptr(),
        [g.data_ptr() for g in flat],
        [_native.DTYPES[g.dtype] for g in flat],
        [[t.position if isinstance(t, Piece) else t.data_ptr() for t in row] for row in rows],
        [[_native.DTYPES[t.dtype] for t in row] for row in rows],
        [[t.fd if isinstance(t, Piece) else -1 for t in row] for row in rows],
        [g.numel() for g in flat],
        [int(norms)] * len(candidates) if isinstance(norms, bool) else [int(n) for n in norms],
        _native.threads(),
    )
    if error:
        raise ReadFailed(error, tensor, candidate)
    return totals


@fw_products.backend("cpu", when=lambda gradient, candidates, **_: _native.cpu_why_not(gradient, *candidates))
def _fw_products_cpu(
    gradient: Tensor, candidates: Sequence[Tensor], *, norms: bool = True, carry: FwProducts | None = None
) -> FwProducts:
    prepare(gradient, candidates, carry)
    k = len(candidates)
    totals = torch.zeros(1, 2 * k + 1, dtype=torch.float64, device="cpu")
    if carry is not None:
        totals[0] = torch.cat([carry.dots, carry.sqnorms, carry.grad_sqnorm.reshape(1)])
    native([gradient], [[s] for s in candidates], norms, totals)
    return _split(totals[0], k, norms or carry is not None)


@fw_products.backend("cuda", when=lambda gradient, candidates, **_: _cuda.why_not(gradient, *candidates))
def _fw_products_cuda(
    gradient: Tensor, candidates: Sequence[Tensor], *, norms: bool = True, carry: FwProducts | None = None
) -> FwProducts:
    prepare(gradient, candidates, carry)
    k = len(candidates)
    totals = torch.zeros(1, 2 * k + 1, dtype=torch.float64, device=gradient.device)
    if carry is not None:
        totals[0] = torch.cat([carry.dots, carry.sqnorms, carry.grad_sqnorm.reshape(1)])
    _fw_cuda.products([gradient], [[s] for s in candidates], norms, totals)
    return _split(totals[0], k, norms or carry is not None)


def _split(totals: Tensor, k: int, norms: bool) -> FwProducts:
    dots, squares, square = totals.split([k, k, 1])
    return FwProducts(dots, squares if norms else torch.full_like(squares, float("nan")), square.reshape(()))


def _inputs(g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], count: int):  # type: ignore[no-untyped-def]
    gradient, *candidates = (torch.randn(shape, generator=g).to(dtype) for _ in range(count + 1))
    return (gradient, candidates), {}


@fw_products.case("three candidates, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _inputs(g, dtype, (131, 257), 3)


@fw_products.case("more than one block")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _inputs(g, dtype, (2 * BLOCK + 77,), 2)


@fw_products.case("float32 gradient, other candidates", torch.bfloat16, torch.float16, torch.float64)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    (gradient, candidates), kwargs = _inputs(g, torch.float32, (33, 40), 9)
    return (gradient, [c.to(dtype) for c in candidates]), kwargs


@fw_products.case("without norms, 0-d")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    args, _ = _inputs(g, dtype, (), 2)
    return args, {"norms": False}


@fw_products.case("empty")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _inputs(g, dtype, (0, 3), 2)

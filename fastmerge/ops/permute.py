"""permute: gather any axes of a tensor by permutations, whole blocks included; in place when asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _cuda, _native
from .._dispatch import op
from ._checks import FLOAT_DTYPES, require_float, result_like
from ._permutations import (
    Perms,
    as_lists,
    gather,
    native_axes,
    normalize,
    past_caches,
    require_bijection,
    require_bijections_native,
    where,
)
from ._permute_cuda import add_gather, permute_in_place, require_bijections, too_many_axes


class Move(NamedTuple):
    """One tensor of a call, validated."""

    x: Tensor
    perms: dict[int, Tensor]
    result: Tensor  # the tensor to fill
    fresh: bool  # result was allocated by us
    name: str


def prepare(
    x: Tensor | Sequence[Tensor],
    perms: Perms | Sequence[Perms],
    out: Tensor | Sequence[Tensor] | None,
    group: str,
    names: str | Sequence[str],
) -> list[Move]:
    """Every tensor of a call with its permutations (lengths and dtypes checked) and the tensor to fill."""
    (xs, outs), many, labels = as_lists("permute", (x, out), perms, names)
    moves = []
    for t, o, p, name in zip(xs, outs, many, labels, strict=True):
        assert t is not None
        require_float("permute", **{f"tensor {name!r}" if name else "x": t})
        found = normalize("permute", t.shape, p, group, name)
        moves.append(Move(t, found, result_like("permute", t, t.dtype, o), o is None, name))
    return moves


@op(numerics="A", kind="selection")
def permute(
    x: Tensor | Sequence[Tensor],
    perms: Perms | Sequence[Perms],
    *,
    out: Tensor | Sequence[Tensor] | None = None,
    check: bool = True,
    group: str = "",
    names: str | Sequence[str] = "",
) -> Tensor | list[Tensor]:
    """Reorders the slices of a tensor along any of its axes.

    ``out[i, j, …] = x[perm₀[i], perm₁[j], …]`` over the axes in `perms`; the other axes stay.

    Args:
        x: [...] any shape, or a list of tensors (one launch for all of them).
        perms: {axis: index}; index is a permutation of 0 … n−1 as an int64 or int32 tensor, or a sequence of ints. With
            n = size of the axis it moves slices; with n a proper divisor it moves n blocks of equal size (attention
            heads). Negative axes count from the end. For a list of tensors: one mapping, or one per tensor.
        out: filled and returned when given; `out=x` reorders in place.
        check: whether each index is verified to be a permutation (O(n); on a GPU one kernel and one synchronisation).
        group, names: of the permutation group and the tensor(s), for error messages.

    Numerics: class A: bits are copied.
    Cost: one read and one write of N elements and of the indices, no workspace; in place, a row along the last axis
        and one slice per cycle segment along the others.
    Raises: TypeError for non-float tensors or a non-integer index; ValueError for an axis out of range or given twice,
        an index of a wrong length, or one that is not a permutation (naming group, tensor, axis and entry).
    Source: Git Re-Basin (arXiv:2209.04836); MuDSC (arXiv:2403.01753), sec. 3.
    """
    moves = prepare(x, perms, out, group, names)
    if check:
        for m in moves:
            for axis, index in m.perms.items():
                require_bijection(index, where("permute", group, m.name, axis))
    results = []
    for m in moves:
        moved = gather(m.x, m.perms)
        if torch.is_grad_enabled() and moved.requires_grad and m.fresh:
            results.append(moved.clone() if moved is m.x else moved)
        else:
            results.append(m.result.copy_(moved))
    return results[0] if isinstance(x, Tensor) else results


def _flat(value: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    return [] if value is None else [value] if isinstance(value, Tensor) else list(value)


@permute.backend("cpu", when=lambda x, perms, *, out=None, **_: _native.cpu_why_not(*_flat(x), *_flat(out)))
def _permute_cpu(
    x: Tensor | Sequence[Tensor],
    perms: Perms | Sequence[Perms],
    *,
    out: Tensor | Sequence[Tensor] | None = None,
    check: bool = True,
    group: str = "",
    names: str | Sequence[str] = "",
) -> Tensor | list[Tensor]:
    moves = prepare(x, perms, out, group, names)
    if check:
        require_bijections_native("permute", [m.perms for m in moves], group, [m.name for m in moves])
    stream = past_caches([m.result for m in moves])
    for m in moves:
        if m.result.data_ptr() == m.x.data_ptr() and m.result.stride() == m.x.stride():
            _permute_in_place(m)
            continue
        source = m.x.contiguous()
        dense = m.result if m.result.is_contiguous() else torch.empty(m.result.shape, dtype=m.result.dtype)
        axes, _alive = native_axes(source.shape, m.perms)
        _native.lib().permute(
            dense.data_ptr(),
            source.data_ptr(),
            source.element_size(),
            source.numel(),
            axes,
            stream,
            _native.threads(),
        )
        if dense is not m.result:
            m.result.copy_(dense)
    return moves[0].result if isinstance(x, Tensor) else [m.result for m in moves]


def _permute_in_place(m: Move) -> None:
    """One axis after the other: they commute."""
    x = m.x.contiguous()
    for axis, index in m.perms.items():
        dense = index.to(torch.int64).contiguous()
        outer, n = math.prod(x.shape[:axis]), dense.numel()
        if x.numel():
            inner = x.numel() // (outer * n) * x.element_size()
            _native.lib().permute_axis(x.data_ptr(), outer, n, inner, dense.data_ptr(), _native.threads())
    if x is not m.x:
        m.result.copy_(x)


def _cuda_why_not(x, perms, *, out=None, **_):  # type: ignore[no-untyped-def]
    reason = _cuda.why_not(*_flat(x), *_flat(out), dtypes=FLOAT_DTYPES)
    if reason is None:
        for m in prepare(x, perms, out, "", ""):
            reason = reason or too_many_axes(m.x.shape, m.perms)
    return reason


@permute.backend("cuda", when=_cuda_why_not)
def _permute_cuda(
    x: Tensor | Sequence[Tensor],
    perms: Perms | Sequence[Perms],
    *,
    out: Tensor | Sequence[Tensor] | None = None,
    check: bool = True,
    group: str = "",
    names: str | Sequence[str] = "",
) -> Tensor | list[Tensor]:
    moves = prepare(x, perms, out, group, names)
    device = moves[0].x.device
    if check:
        require_bijections("permute", [m.perms for m in moves], group, [m.name for m in moves], device)
    launches = _cuda.Launches(device)
    filled: list[tuple[Tensor, Tensor]] = []  # (result, what the kernel fills) where they differ
    for m in moves:
        if m.result.data_ptr() == m.x.data_ptr() and m.result.stride() == m.x.stride():
            dense = m.x.contiguous()
            permute_in_place(dense, m.perms)
        else:
            dense = (
                m.result if m.result.is_contiguous() else torch.empty(m.result.shape, dtype=m.x.dtype, device=device)
            )
            source = m.x.contiguous()
            launches.keep(source)
            add_gather(launches, dense, source, m.x.shape, m.perms)
        if dense is not m.result:
            filled.append((m.result, dense))
    launches.run()
    for result, dense in filled:
        result.copy_(dense)
    return moves[0].result if isinstance(x, Tensor) else [m.result for m in moves]


def _case(g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], **perms: int):  # type: ignore[no-untyped-def]
    """A random tensor and random permutations: axis name "a<axis>" -> number of slices or blocks."""
    x = torch.randn(shape, generator=g).to(dtype)
    return (x, {int(k[1:]): torch.randperm(n, generator=g) for k, n in perms.items()}), {}


@permute.case("rows of a matrix")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (70, 264), a0=70)


@permute.case("columns of a matrix, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (37, 131), a1=131)


@permute.case("rows and columns")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (129, 96), a0=129, a1=96)


@permute.case("convolution, both channel axes")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (24, 17, 3, 3), a0=24, a1=17)


@permute.case("heads as blocks, and input columns")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (96, 40), a0=12, a1=40)


@permute.case("rank 5, first, middle and last axes")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (3, 4, 5, 2, 7), a0=3, a2=5, a4=7)


@permute.case("bias")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (257,), a0=257)


@permute.case("no axis, 0-d")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, ())


@permute.case("empty")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (0, 6), a1=6)


@permute.case("int32 index, special values, negative axis")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x = torch.tensor([[0.0, -0.0, float("inf"), float("nan"), 1e-40, -65504.0]] * 2).to(dtype)
    return (x, {-1: torch.randperm(6, generator=g).int()}), {}


@permute.case("a group of tensors in one call")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    shared, heads = torch.randperm(48, generator=g), torch.randperm(6, generator=g)
    shapes = [(48, 33), (48,), (20, 48), (7, 48, 3)]
    xs = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    return (xs, [{0: shared}, {0: heads}, {1: shared}, {1: shared}]), {"group": "p", "names": ["a", "b", "c", "d"]}

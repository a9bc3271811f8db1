"""permute: gather any axes of a tensor by permutations, whole blocks included; in place when asked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _cuda, _native
from .._dispatch import op
from ._checks import FLOAT_DTYPES
from ._permutations import Perms, gather
from ._permute_call import (
    CASES,
    SPECIAL,
    Task,
    Tensors,
    answer,
    case,
    check_native,
    check_reference,
    flat,
    group_case,
    prepare,
    run_cuda,
    run_native,
)
from ._permute_cuda import too_many_axes


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
    tasks = prepare("permute", x, None, perms, out=out, group=group, names=names)
    if check:
        check_reference("permute", tasks, group)
    results = []
    for t in tasks:
        moved = gather(t.source, t.perms)
        if torch.is_grad_enabled() and moved.requires_grad and t.fresh:
            results.append(moved.clone() if moved is t.source else moved)
        else:
            results.append(t.result.copy_(moved))
    return results[0] if isinstance(x, Tensor) else results


@permute.backend("cpu", when=lambda x, perms, *, out=None, **_: _native.cpu_why_not(*flat(x, out)))
def _permute_cpu(
    x: Tensors,
    perms: Perms | Sequence[Perms],
    *,
    out: Tensors | None = None,
    check: bool = True,
    group: str = "",
    names: str | Sequence[str] = "",
) -> Tensor | list[Tensor]:
    tasks = prepare("permute", x, None, perms, out=out, group=group, names=names)
    if check:
        check_native("permute", tasks, group)
    for t in tasks:
        if t.in_place:
            _permute_in_place(t)

    def kernel(t: Task, dense: Tensor, source: Tensor, axes: list[tuple[int, int]], stream: bool) -> None:
        addresses, size = (dense.data_ptr(), source.data_ptr()), source.element_size()
        _native.lib().permute(*addresses, size, source.numel(), axes, stream, _native.threads())

    run_native(tasks, kernel)
    return answer(x, tasks)


def _permute_in_place(t: Task) -> None:
    """One axis after the other: they commute."""
    x = t.source.contiguous()
    for axis, index in t.perms.items():
        dense = index.to(torch.int64).contiguous()
        outer, n = math.prod(x.shape[:axis]), dense.numel()
        if x.numel():
            inner = x.numel() // (outer * n) * x.element_size()
            _native.lib().permute_axis(x.data_ptr(), outer, n, inner, dense.data_ptr(), _native.threads())
    if x is not t.source:
        t.result.copy_(x)


def _cuda_why_not(x, perms, *, out=None, **_):  # type: ignore[no-untyped-def]
    reason = _cuda.why_not(*flat(x, out), dtypes=FLOAT_DTYPES)
    if reason is None:
        for t in prepare("permute", x, None, perms, out=out):
            reason = reason or too_many_axes(t.source.shape, t.perms)
    return reason


@permute.backend("cuda", when=_cuda_why_not)
def _permute_cuda(
    x: Tensors,
    perms: Perms | Sequence[Perms],
    *,
    out: Tensors | None = None,
    check: bool = True,
    group: str = "",
    names: str | Sequence[str] = "",
) -> Tensor | list[Tensor]:
    tasks = prepare("permute", x, None, perms, out=out, group=group, names=names)
    run_cuda("permute", tasks, check=check, group=group)
    return answer(x, tasks)


for _name, (_shape, _slices) in CASES.items():
    permute.case(_name)(case(_shape, _slices, 1, {}))
permute.case("a group of tensors in one call")(group_case(1))


@permute.case("int32 index, special values, negative axis")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x = torch.tensor([SPECIAL] * 2).to(dtype)
    return (x, {-1: torch.randperm(6, generator=g).int()}), {}

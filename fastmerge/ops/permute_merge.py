"""permute_merge: average a tensor with another one whose axes are permuted on the way, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _cuda, _native
from .._dispatch import op
from ._checks import compute_dtype
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


@op(numerics="A", kind="elementwise")
def permute_merge(
    base: Tensor | Sequence[Tensor],
    other: Tensor | Sequence[Tensor],
    perms: Perms | Sequence[Perms],
    weight: float = 0.5,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    check: bool = True,
    group: str = "",
    names: str | Sequence[str] = "",
) -> Tensor | list[Tensor]:
    """The weighted mean of a tensor and a permuted other one.

    ``out = (1 − w)·base + w·other[perm₀, perm₁, …]`` with :func:`permute`'s gather. K models are averaged by calling it
    for k = 1 … K−1 with w = 1/(k + 1), ``out=base`` and, below float32, ``dtype=torch.float32`` until the last.

    Args:
        base, other: [...] of one shape, or lists of tensors (one launch for all of them).
        perms: {axis: index} applied to `other`, as in :func:`permute`; may be empty.
        weight: w, of `other`.
        dtype: of the result; default: base's.
        out: filled and returned when given; it may be `base`, not `other`.
        check, group, names: as in :func:`permute`.

    Numerics: class A. float32 (float64 when an input is), two products and one sum, no contraction, rounded once; 1 − w
        is computed in float64.
    Cost: two reads and one write of N elements, 3N flops, no workspace.
    Raises: as :func:`permute`; ValueError when shapes or devices differ or `out` is `other`.
    Source: MuDSC (arXiv:2403.01753), sec. 3; Git Re-Basin (arXiv:2209.04836).
    """
    tasks = prepare("permute_merge", other, base, perms, dtype=dtype, out=out, group=group, names=names)
    if check:
        check_reference("permute_merge", tasks, group)
    results = []
    for t in tasks:
        assert t.base is not None
        compute = compute_dtype(t.base, t.source)
        left = t.base.to(compute) * torch.tensor(1.0 - weight, dtype=compute, device="cpu")
        total = left + gather(t.source, t.perms).to(compute) * torch.tensor(weight, dtype=compute, device="cpu")
        differentiable = torch.is_grad_enabled() and total.requires_grad and t.fresh
        results.append(total.to(t.result.dtype) if differentiable else t.result.copy_(total))
    return results[0] if isinstance(base, Tensor) else results


@permute_merge.backend(
    "cpu", when=lambda base, other, perms, weight=0.5, *, out=None, **_: _native.cpu_why_not(*flat(base, other, out))
)
def _permute_merge_cpu(
    base: Tensors,
    other: Tensors,
    perms: Perms | Sequence[Perms],
    weight: float = 0.5,
    *,
    dtype: torch.dtype | None = None,
    out: Tensors | None = None,
    check: bool = True,
    group: str = "",
    names: str | Sequence[str] = "",
) -> Tensor | list[Tensor]:
    tasks = prepare("permute_merge", other, base, perms, dtype=dtype, out=out, group=group, names=names)
    if check:
        check_native("permute_merge", tasks, group)

    def kernel(t: Task, dense: Tensor, source: Tensor, axes: list[tuple[int, int]], stream: bool) -> None:
        assert t.base is not None
        left = t.base.contiguous()
        arrays = [v for x in (dense, left, source) for v in (x.data_ptr(), _native.DTYPES[x.dtype])]
        _native.lib().permute_merge(*arrays, source.numel(), axes, weight, stream, _native.threads())

    run_native(tasks, kernel)
    return answer(base, tasks)


def _cuda_why_not(base, other, perms, weight=0.5, *, dtype=None, out=None, **_):  # type: ignore[no-untyped-def]
    reason = _cuda.why_not(*flat(base, other, out))
    if reason is None:
        for t in prepare("permute_merge", other, base, perms, dtype=dtype, out=out):
            assert t.base is not None
            if not t.base.dtype == t.source.dtype == t.result.dtype:
                return f"dtypes {t.base.dtype}, {t.source.dtype} and {t.result.dtype} differ"
            reason = reason or too_many_axes(t.base.shape, t.perms)
    return reason


@permute_merge.backend("cuda", when=_cuda_why_not)
def _permute_merge_cuda(
    base: Tensors,
    other: Tensors,
    perms: Perms | Sequence[Perms],
    weight: float = 0.5,
    *,
    dtype: torch.dtype | None = None,
    out: Tensors | None = None,
    check: bool = True,
    group: str = "",
    names: str | Sequence[str] = "",
) -> Tensor | list[Tensor]:
    tasks = prepare("permute_merge", other, base, perms, dtype=dtype, out=out, group=group, names=names)
    run_cuda("permute_merge", tasks, weight=weight, check=check, group=group)
    return answer(base, tasks)


for _name, (_shape, _slices) in CASES.items():
    permute_merge.case(_name)(case(_shape, _slices, 2, {"weight": 0.3}))
permute_merge.case("a group of tensors in one call")(group_case(2))


@permute_merge.case("special values, weight 0")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base = torch.tensor([SPECIAL] * 2).to(dtype)
    return (base, base.flip(1), {1: torch.randperm(6, generator=g).int()}), {"weight": 0.0}

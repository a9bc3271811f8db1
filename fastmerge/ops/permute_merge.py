"""permute_merge: average a tensor with another one whose axes are permuted on the way, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _cuda, _native
from .._dispatch import op
from ._checks import compute_dtype, require_float, require_like, result_like
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
from ._permute_cuda import add_gather, require_bijections, too_many_axes


class Pair(NamedTuple):
    """One pair of tensors of a call, validated."""

    base: Tensor
    other: Tensor
    perms: dict[int, Tensor]
    result: Tensor  # the tensor to fill
    fresh: bool  # result was allocated by us
    name: str


def prepare(
    base: Tensor | Sequence[Tensor],
    other: Tensor | Sequence[Tensor],
    perms: Perms | Sequence[Perms],
    dtype: torch.dtype | None,
    out: Tensor | Sequence[Tensor] | None,
    group: str,
    names: str | Sequence[str],
) -> list[Pair]:
    """Every pair of a call with its permutations (lengths and dtypes checked) and the tensor to fill."""
    (bases, others, outs), many, labels = as_lists("permute_merge", (base, other, out), perms, names)
    pairs = []
    for b, t, o, p, name in zip(bases, others, outs, many, labels, strict=True):
        assert b is not None
        assert t is not None
        require_float("permute_merge", **{f"tensor {name!r}" if name else "base": b})
        require_like("permute_merge", b, [t], f"other of {name!r}" if name else "other")
        if o is not None and o.data_ptr() == t.data_ptr() and o.numel():
            raise ValueError("permute_merge: out may be base, but not other: its elements are read in another order")
        found = normalize("permute_merge", b.shape, p, group, name)
        pairs.append(Pair(b, t, found, result_like("permute_merge", b, dtype, o), o is None, name))
    return pairs


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
    pairs = prepare(base, other, perms, dtype, out, group, names)
    if check:
        for p in pairs:
            for axis, index in p.perms.items():
                require_bijection(index, where("permute_merge", group, p.name, axis))
    results = []
    for p in pairs:
        compute = compute_dtype(p.base, p.other)
        left = p.base.to(compute) * torch.tensor(1.0 - weight, dtype=compute)
        total = left + gather(p.other, p.perms).to(compute) * torch.tensor(weight, dtype=compute)
        differentiable = torch.is_grad_enabled() and total.requires_grad and p.fresh
        results.append(total.to(p.result.dtype) if differentiable else p.result.copy_(total))
    return results[0] if isinstance(base, Tensor) else results


def _flat(*values: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    return [t for v in values if v is not None for t in ([v] if isinstance(v, Tensor) else v)]


@permute_merge.backend(
    "cpu", when=lambda base, other, perms, weight=0.5, *, out=None, **_: _native.cpu_why_not(*_flat(base, other, out))
)
def _permute_merge_cpu(
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
    pairs = prepare(base, other, perms, dtype, out, group, names)
    if check:
        require_bijections_native("permute_merge", [p.perms for p in pairs], group, [p.name for p in pairs])
    stream = past_caches([p.result for p in pairs])
    for p in pairs:
        b, t = p.base.contiguous(), p.other.contiguous()
        dense = p.result if p.result.is_contiguous() else torch.empty(p.result.shape, dtype=p.result.dtype)
        axes, _alive = native_axes(t.shape, p.perms)
        _native.lib().permute_merge(
            dense.data_ptr(),
            _native.DTYPES[dense.dtype],
            b.data_ptr(),
            _native.DTYPES[b.dtype],
            t.data_ptr(),
            _native.DTYPES[t.dtype],
            b.numel(),
            axes,
            weight,
            stream,
            _native.threads(),
        )
        if dense is not p.result:
            p.result.copy_(dense)
    return pairs[0].result if isinstance(base, Tensor) else [p.result for p in pairs]


def _cuda_why_not(base, other, perms, weight=0.5, *, dtype=None, out=None, **_):  # type: ignore[no-untyped-def]
    tensors = _flat(base, other, out)
    reason = _cuda.why_not(*tensors)
    if reason is None:
        for p in prepare(base, other, perms, dtype, out, "", ""):
            if not p.base.dtype == p.other.dtype == p.result.dtype:
                return f"dtypes {p.base.dtype}, {p.other.dtype} and {p.result.dtype} differ"
            reason = reason or too_many_axes(p.base.shape, p.perms)
    return reason


@permute_merge.backend("cuda", when=_cuda_why_not)
def _permute_merge_cuda(
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
    pairs = prepare(base, other, perms, dtype, out, group, names)
    device = pairs[0].base.device
    if check:
        require_bijections("permute_merge", [p.perms for p in pairs], group, [p.name for p in pairs], device)
    launches = _cuda.Launches(device)
    filled: list[tuple[Tensor, Tensor]] = []  # (result, what the kernel fills) where they differ
    for p in pairs:
        b, t = p.base.contiguous(), p.other.contiguous()
        launches.alive += [b, t]
        dense = p.result if p.result.is_contiguous() else torch.empty(b.shape, dtype=b.dtype, device=device)
        add_gather(launches, dense, t, t.shape, p.perms, b, weight)
        if dense is not p.result:
            filled.append((p.result, dense))
    launches.run()
    for result, dense in filled:
        result.copy_(dense)
    return pairs[0].result if isinstance(base, Tensor) else [p.result for p in pairs]


def _case(g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], **perms: int):  # type: ignore[no-untyped-def]
    base, other = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    return (base, other, {int(k[1:]): torch.randperm(n, generator=g) for k, n in perms.items()}), {"weight": 0.3}


@permute_merge.case("rows of a matrix")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (70, 264), a0=70)


@permute_merge.case("columns of a matrix, odd size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (37, 131), a1=131)


@permute_merge.case("rows and columns")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (129, 96), a0=129, a1=96)


@permute_merge.case("convolution, both channel axes")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (24, 17, 3, 3), a0=24, a1=17)


@permute_merge.case("heads as blocks, and input columns")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (96, 40), a0=12, a1=40)


@permute_merge.case("bias")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (257,), a0=257)


@permute_merge.case("no permutation, 0-d")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, ())


@permute_merge.case("empty")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _case(g, dtype, (0, 6), a1=6)


@permute_merge.case("special values, weight 0")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base = torch.tensor([[0.0, -0.0, float("inf"), float("nan"), 1e-40, -65504.0]] * 2).to(dtype)
    return (base, base.flip(1), {1: torch.randperm(6, generator=g).int()}), {"weight": 0.0}


@permute_merge.case("a group of tensors in one call")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    shared, heads = torch.randperm(48, generator=g), torch.randperm(6, generator=g)
    shapes = [(48, 33), (48,), (20, 48), (7, 48, 3)]
    bases, others = ([torch.randn(s, generator=g).to(dtype) for s in shapes] for _ in range(2))
    return (bases, others, [{0: shared}, {0: heads}, {1: shared}, {1: shared}]), {"group": "p"}

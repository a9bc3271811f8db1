"""expert_scatter: add a sparse expert to a tensor in place, or put it over it, and keep what undoes it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _cuda, _native
from .._dispatch import op
from ._checks import compute_dtype, require_float

MODES = ("add", "override")


def prepare(
    x: Tensor | Sequence[Tensor],
    index: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    scale: float | Sequence[float],
    mode: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
    """Lists of one length, shapes and dtypes checked (not the indices' values)."""
    if mode not in MODES:
        raise ValueError(f"expert_scatter: mode {mode!r} is not one of {', '.join(MODES)}")
    xs = [x] if isinstance(x, Tensor) else list(x)
    indices = [index] if isinstance(index, Tensor) else list(index)
    values = [value] if isinstance(value, Tensor) else list(value)
    scales = [float(scale)] * len(xs) if isinstance(scale, (int, float)) else [float(s) for s in scale]
    if not len(xs) == len(indices) == len(values) == len(scales):
        raise ValueError(
            f"expert_scatter: {len(xs)} tensors, {len(indices)} indices, {len(values)} values, {len(scales)} scales"
        )
    for n, (t, i, v) in enumerate(zip(xs, indices, values, strict=True)):
        require_float("expert_scatter", **{f"x[{n}]": t, f"value[{n}]": v})
        if i.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"expert_scatter: index[{n}] has dtype {i.dtype}; int32 or int64 is needed")
        if i.ndim != 1 or v.shape != i.shape:
            raise ValueError(
                f"expert_scatter: index[{n}] has shape {tuple(i.shape)} and value[{n}] {tuple(v.shape)}; "
                "two vectors of one length are needed"
            )
        if not t.device == i.device == v.device:
            raise ValueError(f"expert_scatter: x[{n}] is on {t.device}, index on {i.device}, value on {v.device}")
    return xs, indices, values, scales


def require_increasing(index: Tensor, size: int, n: int) -> None:
    """Raises ValueError unless the positions are strictly increasing within 0 … size−1."""
    if index.numel() == 0:
        return
    wrong = (index[1:] <= index[:-1]).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(
            f"expert_scatter: index[{n}] must be strictly increasing: entry {at} is {int(index[at])}, "
            f"entry {at + 1} is {int(index[at + 1])}; sort it and drop duplicates"
        )
    if int(index[0]) < 0 or int(index[-1]) >= size:
        raise ValueError(
            f"expert_scatter: index[{n}] spans {int(index[0])}..{int(index[-1])}, but the tensor has {size} elements"
        )


@op(numerics="A", kind="elementwise")
def expert_scatter(
    x: Tensor | Sequence[Tensor],
    index: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    *,
    scale: float | Sequence[float] = 1.0,
    mode: str = "add",
    check: bool = True,
) -> Tensor | list[Tensor]:
    """Adds a sparse vector to a tensor in place (``add``) or writes it over it (``override``); returns what was there.

    ``add``: ``x[index] += scale·value``; ``override``: ``x[index] = scale·value``. The result, `saved`, undoes the call
    exactly: ``expert_scatter(x, index, saved, mode="override")``.

    Args:
        x: [...] changed in place; or a list of tensors (one launch for all).
        index: [n] positions in x flattened row by row, strictly increasing, int32 or int64.
        value: [n], any float dtype.
        scale: one number, or one per tensor.
        check: whether positions are verified before anything is written; pass False for indices checked before.

    Returns: saved [n] of x's dtype (a list of them when x is a list).
    Numerics: class A. float32 (float64 when an input is), one product, one sum, rounded once to x's dtype; with
        scale 1, ``override`` copies bits between tensors of one dtype.
    Cost: index and value read, n elements of x read and written, n written to saved; no workspace.
    Raises: TypeError, ValueError for dtypes, lengths, devices, an unknown mode, or positions that are not strictly
        increasing or not within x: nothing has been changed then.
    Source: FREE-Merging (arXiv:2411.16815), sec. 3.3 (experts added to the merged backbone).
    """
    xs, indices, values, scales = prepare(x, index, value, scale, mode)
    if check:
        for n, (t, i) in enumerate(zip(xs, indices, strict=True)):
            require_increasing(i, t.numel(), n)
    saved = []
    for t, i, v, s in zip(xs, indices, values, scales, strict=True):
        flat = t.reshape(-1)
        at = i.long()
        old = flat[at]
        saved.append(old)
        if mode == "override" and s == 1.0 and v.dtype == t.dtype:
            new = v
        else:
            compute = compute_dtype(t, v)
            term = v.to(compute) * torch.tensor(s, dtype=compute, device="cpu")
            new = (old.to(compute) + term if mode == "add" else term).to(t.dtype)
        flat[at] = new
        if flat.data_ptr() != t.data_ptr() or not t.is_contiguous():
            t.copy_(flat.view(t.shape))
    return saved[0] if isinstance(x, Tensor) else saved


def _flat(*values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [t for v in values for t in ([v] if isinstance(v, Tensor) else v)]


@expert_scatter.backend("cpu", when=lambda x, index, value, **_: _native.cpu_why_not(*_flat(x, value)))
def _expert_scatter_cpu(
    x: Tensor | Sequence[Tensor],
    index: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    *,
    scale: float | Sequence[float] = 1.0,
    mode: str = "add",
    check: bool = True,
) -> Tensor | list[Tensor]:
    xs, indices, values, scales = prepare(x, index, value, scale, mode)
    lib, threads = _native.lib(), _native.threads()
    indices = [i.contiguous() for i in indices]
    if check:
        for n, (t, i) in enumerate(zip(xs, indices, strict=True)):
            if not lib.check_positions(i.data_ptr(), i.dtype == torch.int64, i.numel(), t.numel()):
                require_increasing(i, t.numel(), n)
    saved = []
    for t, i, v, s in zip(xs, indices, values, scales, strict=True):
        dense, v = t.contiguous(), v.contiguous()
        old = torch.empty(i.numel(), dtype=t.dtype, device="cpu")
        lib.expert_scatter(
            dense.data_ptr(),
            _native.DTYPES[t.dtype],
            i.data_ptr(),
            i.dtype == torch.int64,
            v.data_ptr(),
            _native.DTYPES[v.dtype],
            old.data_ptr(),
            i.numel(),
            s,
            mode == "add",
            threads,
        )
        if dense is not t:
            t.copy_(dense)
        saved.append(old)
    return saved[0] if isinstance(x, Tensor) else saved


_TASK = np.dtype(
    [("x", "u8"), ("index", "u8"), ("value", "u8"), ("saved", "u8"), ("n", "i8"), ("size", "i8"), ("flags", "i8"),
     ("scale", "f4"), ("unused", "i4")]
)  # fmt: skip
_POSITIONS = np.dtype([("index", "u8"), ("wrong", "u8"), ("n", "i8"), ("size", "i8")])
_ADD, _COPY, _ITEMS = 1, 2, 8  # FM_ADD, FM_COPY, FM_ITEMS


def _cuda_why_not(x, index, value, **_):  # type: ignore[no-untyped-def]
    xs, values = _flat(x), _flat(value)
    reason = _cuda.why_not(*xs, *values)
    if reason is None:
        for t, v in zip(xs, values, strict=False):
            if v.dtype not in (t.dtype, torch.float32):
                return f"values of {v.dtype} for a tensor of {t.dtype}; {t.dtype} or float32 is needed"
    return reason


@expert_scatter.backend("cuda", when=_cuda_why_not)
def _expert_scatter_cuda(
    x: Tensor | Sequence[Tensor],
    index: Tensor | Sequence[Tensor],
    value: Tensor | Sequence[Tensor],
    *,
    scale: float | Sequence[float] = 1.0,
    mode: str = "add",
    check: bool = True,
) -> Tensor | list[Tensor]:
    xs, indices, values, scales = prepare(x, index, value, scale, mode)
    if not xs:
        return []
    device = xs[0].device
    indices = [i.contiguous() for i in indices]
    if check:
        _check_positions_cuda(xs, indices, device)
    launches = _cuda.Launches(device)
    saved, dense = [], []
    for t, i, v, s in zip(xs, indices, values, scales, strict=True):
        dense.append(t.contiguous())
        saved.append(torch.empty(i.numel(), dtype=t.dtype, device=device))
        task: Any = np.zeros((), _TASK)
        task["x"], task["index"], task["value"] = dense[-1].data_ptr(), i.data_ptr(), launches.keep(v.contiguous())
        task["saved"], task["n"], task["size"], task["scale"] = saved[-1].data_ptr(), i.numel(), t.numel(), s
        copies = mode == "override" and s == 1.0 and v.dtype == t.dtype
        task["flags"] = _COPY if copies else _ADD if mode == "add" else 0
        kernel = f"expert_scatter_kernel_{_cuda.NAMES[t.dtype]}_{_cuda.NAMES[v.dtype]}_{_width(i)}"
        launches.add(kernel, task, -(-i.numel() // (_cuda.THREADS * _ITEMS)))
    launches.run()
    for t, d in zip(xs, dense, strict=True):
        if d is not t:
            t.copy_(d)
    return saved[0] if isinstance(x, Tensor) else saved


def _width(index: Tensor) -> str:
    return "i64" if index.dtype == torch.int64 else "i32"


def _check_positions_cuda(xs: Sequence[Tensor], indices: Sequence[Tensor], device: torch.device) -> None:
    """One launch per index dtype and one synchronisation; bad positions are then named by the reference."""
    launches = _cuda.Launches(device)
    wrong = torch.zeros(len(xs), dtype=torch.int32, device=device)
    for n, (t, i) in enumerate(zip(xs, indices, strict=True)):
        task: Any = np.zeros((), _POSITIONS)
        task["index"], task["wrong"] = i.data_ptr(), wrong.data_ptr() + 4 * n
        task["n"], task["size"] = i.numel(), t.numel()
        launches.add(f"check_positions_kernel_{_width(i)}", task, -(-i.numel() // _cuda.THREADS))
    launches.run()
    for n, bad in enumerate(wrong.tolist()):
        if bad:
            require_increasing(indices[n].cpu(), xs[n].numel(), n)


def _sparse(g: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...], count: int, index: torch.dtype):  # type: ignore[no-untyped-def]
    x = torch.randn(shape, generator=g).to(dtype)
    at = torch.randperm(x.numel(), generator=g)[:count].sort().values.to(index)
    return x, at, torch.randn(count, generator=g).to(dtype)


@expert_scatter.case("add one percent, int32")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _sparse(g, dtype, (130, 257), 334, torch.int32), {"scale": 0.7}


@expert_scatter.case("override, int64")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _sparse(g, dtype, (70, 64), 1001, torch.int64), {"scale": -1.3, "mode": "override"}


@expert_scatter.case("override without scale copies bits")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x, at, value = _sparse(g, dtype, (9, 64), 33, torch.int64)
    value[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]).to(dtype)
    return (x, at, value), {"mode": "override"}


@expert_scatter.case("every element")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _sparse(g, dtype, (5, 67), 335, torch.int32), {}


@expert_scatter.case("empty expert")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return _sparse(g, dtype, (5, 7), 0, torch.int32), {}


@expert_scatter.case("float32 values over any dtype")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x, at, value = _sparse(g, dtype, (31, 33), 77, torch.int32)
    return (x, at, value.float()), {"scale": 3.0}


@expert_scatter.case("a list of tensors")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    parts = [_sparse(g, dtype, s, c, torch.int32) for s, c in [((40, 30), 100), ((64,), 7), ((3, 5, 7), 0)]]
    xs, indices, values = (list(p) for p in zip(*parts, strict=True))
    return (xs, indices, values), {"scale": [1.0, 0.5, 2.0]}

"""expert_gather: the largest entries of every row of a task vector, as positions and values."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._dispatch import op
from ._checks import compute_dtype, require_float, require_like
from .threshold import kept_count, magnitude_key, require_density


def _prepare(base: Tensor | None, model: Tensor, density: float) -> int:
    """The entries kept of every row; raises for bad input."""
    require_float("expert_gather", model=model, **({} if base is None else {"base": base}))
    if base is not None:
        require_like("expert_gather", base, [model], "model")
    require_density("expert_gather", [density])
    return kept_count(density, model.shape[-1] if model.ndim else 1)


@op(numerics="A", kind="selection")
def expert_gather(base: Tensor | None, model: Tensor, density: float, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Positions and values of the k largest magnitudes in every row of v = model − base (of model without a base).

    ``k = int(density · length)``, at least 1 when density > 0, of rows along the last axis; ties to the lowest index,
    NaN above Inf, as :func:`topk_mask` with ``dim=-1``.

    Args:
        base: [..., L] or None.
        model: [..., L], base's shape; any float dtypes. A 0-d tensor is a row of one.
        density: fraction kept, in [0, 1].
        offset: added to every position: the flat index of the first element within its tensor.

    Returns: (index [rows · k] int64, strictly increasing; value [rows · k], float32, float64 when an input is).
    Numerics: class A: the entries of topk_mask; values are differences of the widened inputs.
    Cost: one read of the inputs, 16 bytes written for an entry (CPU); a few rows of workspace per thread.
    Raises: TypeError for non-float tensors; ValueError for shapes or devices that differ, or a density outside [0, 1].
    Source: the experts M(v, d) of FREE-Merging (arXiv:2411.16815), eq. 7.
    """
    k = _prepare(base, model, density)
    compute = compute_dtype(model, *([] if base is None else [base]))
    delta = model.to(compute) if base is None else model.to(compute) - base.to(compute)
    rows = delta.reshape(-1, model.shape[-1] if model.ndim else 1)
    order = magnitude_key(rows).sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(dim=-1).values
    index = (order + torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]).reshape(-1)
    return index + offset, rows.reshape(-1)[index]


def _why_not(base: Tensor | None, model: Tensor, *_: object, **__: object) -> str | None:
    if model.ndim and model.shape[-1] >= 2**31:
        return "a row is longer than 2^31 elements"
    return _native.cpu_why_not(model, *([] if base is None else [base]))


@expert_gather.backend("cpu", when=_why_not)
def _expert_gather_cpu(base: Tensor | None, model: Tensor, density: float, *, offset: int = 0) -> tuple[Tensor, Tensor]:
    k = _prepare(base, model, density)
    compute = compute_dtype(model, *([] if base is None else [base]))
    length = model.shape[-1] if model.ndim else 1
    rows = model.numel() // length if length else 0
    index = torch.empty(rows * k, dtype=torch.int64, device="cpu")
    value = torch.empty(rows * k, dtype=compute, device="cpu")
    if rows * k:
        x, origin = model.contiguous(), None if base is None else base.contiguous()
        first = (0, 0) if origin is None else (origin.data_ptr(), _native.DTYPES[origin.dtype])
        _native.lib().expert_gather(
            *first, x.data_ptr(), _native.DTYPES[x.dtype], rows, length, k, offset, index.data_ptr(), value.data_ptr(),
            _native.threads(),
        )  # fmt: skip
    return index, value


@expert_gather.case("rows of a delta")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base = torch.randn(67, 517, generator=g)
    return (base.to(dtype), (base + 0.1 * torch.randn(67, 517, generator=g)).to(dtype), 0.02), {}


@expert_gather.case("no base, three axes, an offset")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, torch.randn(5, 7, 331, generator=g).to(dtype), 0.1), {"offset": 1 << 33}


@expert_gather.case("rows of very different size")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x = torch.randn(40, 1100, generator=g) * torch.logspace(-3, 3, 40)[torch.randperm(40, generator=g), None]
    return (None, x.to(dtype), 0.01), {}


@expert_gather.case("heavy ties")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, (torch.randint(-3, 4, (30, 2001), generator=g) / 8).to(dtype), 0.3), {}


@expert_gather.case("zero rows and special values")
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x = torch.zeros(6, 90)
    x[1, ::7] = torch.randn(13, generator=g)
    x[2, 3:9] = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-39])
    x[4] = torch.randn(90, generator=g)
    x[5, 10:60] = torch.randn(50, generator=g)
    x[5, 20], x[5, 55], x[5, 5] = float("nan"), float("nan"), -float("nan")
    return (None, x.to(dtype), 0.05), {}


@expert_gather.case("one of every row, mixed dtypes", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    base = torch.randn(50, 40, generator=g)
    return (base.to(dtype), (base + torch.randn(50, 40, generator=g)).half(), 0.001), {}


@expert_gather.case("everything", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, torch.randn(4, 9, generator=g).to(dtype), 1.0), {}


@expert_gather.case("nothing", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, torch.randn(4, 9, generator=g).to(dtype), 0.0), {}


@expert_gather.case("an empty tensor", torch.float32)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    return (None, torch.empty(0, 9, dtype=dtype), 0.5), {}

"""Argument checks and dtype rules shared by the operators' references and stubs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def require_float(op: str, **tensors: Tensor) -> None:
    """Raises TypeError naming the argument unless every tensor is float32, float64, float16 or bfloat16."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(t).__name__}")
        if t.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; float32, float64, float16 or bfloat16 is needed")


def require_like(op: str, base: Tensor, models: Sequence[Tensor], name: str = "models") -> None:
    """Raises unless every model is a float tensor of base's shape and device."""
    for i, m in enumerate(models):
        require_float(op, **{f"{name}[{i}]": m})
        if m.shape != base.shape:
            raise ValueError(f"{op}: {name}[{i}] has shape {tuple(m.shape)}, expected {tuple(base.shape)}")
        if m.device != base.device:
            raise ValueError(f"{op}: {name}[{i}] is on {m.device}, expected {base.device}")


def per_model(op: str, name: str, value: float | Sequence[float] | Tensor, count: int) -> list[float]:
    """A scalar for all models or one number per model, as a list of `count` floats."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (int, float)):
        return [float(value)] * count
    values = [float(v) for v in value]
    if len(values) != count:
        raise ValueError(f"{op}: {name} has {len(values)} entries for {count} models")
    return values


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Arithmetic is done in float32, or in float64 when an input is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def require_family(op_name: str, base: Tensor, models: Sequence[Tensor]) -> None:
    """Raises unless there is a base and at least one model, float tensors of one shape."""
    if not models:
        raise ValueError(f"{op_name}: models is empty")
    require_float(op_name, base=base)
    require_like(op_name, base, models)


def float_deltas(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """modelᵢ − base in float32, or float64 when an input is."""
    wide = compute_dtype(base, *models)
    return [m.to(wide) - base.to(wide) for m in models]


def result_like(op: str, like: Tensor, dtype: torch.dtype | None, out: Tensor | None) -> Tensor:
    """The tensor a kernel fills: `out` when given (checked), else a new contiguous one of like's shape."""
    if out is None:
        return _native.fresh(like.shape, dtype or like.dtype, like.device)
    require_float(op, out=out)
    if out.shape != like.shape or out.device != like.device:
        raise ValueError(f"{op}: out has shape {tuple(out.shape)} on {out.device}, expected {tuple(like.shape)}")
    if out.is_neg():
        raise ValueError(
            f"{op}: out is negated lazily by torch; give a tensor that holds its values (out.resolve_neg())"
        )
    if dtype is not None and out.dtype != dtype:
        raise ValueError(f"{op}: out has dtype {out.dtype}, but dtype={dtype} was asked for")
    return out

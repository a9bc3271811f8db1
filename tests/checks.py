"""Comparators and the operator checker: one tolerance table, worst elements printed, NaN-poisoned outputs.

`check_op` runs every backend of an operator over its cases, dtypes and layouts against the reference. Class A operators
must agree bit for bit (NaN payloads excepted); the others within TOLERANCES. tests/test_checks.py plants errors here.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastmerge._dispatch import REFERENCE, Op

# Relative RMS of the error, per dtype and kind of arithmetic.
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"elementwise": 1e-14, "reduction": 1e-12, "reduction32": 1e-6, "fft": 1e-12},
    torch.float32: {"elementwise": 1e-6, "reduction": 1e-5, "reduction32": 1e-6, "fft": 2e-6},
    torch.bfloat16: {"elementwise": 4e-3, "reduction": 8e-3, "reduction32": 1e-6, "fft": 4e-3},
    torch.float16: {"elementwise": 5e-4, "reduction": 2e-3, "reduction32": 1e-6, "fft": 5e-4},
}


def _worst(got: Tensor, want: Tensor, error: Tensor, count: int = 5) -> str:
    flat = torch.nan_to_num(error.reshape(-1).double(), nan=float("inf"))
    rows = []
    for i in torch.topk(flat, min(count, flat.numel())).indices.tolist():
        where = tuple(int(v) for v in torch.unravel_index(torch.tensor(i), got.shape))
        rows.append(f"  at {where}: got {got.reshape(-1)[i].item()!r}, want {want.reshape(-1)[i].item()!r}")
    return "\n".join(rows)


def _same_kind(got: Tensor, want: Tensor, what: str) -> None:
    assert isinstance(got, Tensor), f"{what}: got {type(got).__name__}, want a tensor"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"


def assert_same_bits(got: Tensor, want: Tensor, what: str = "result") -> None:
    """Equal bit for bit, the sign of zero included; any NaN equals any NaN."""
    _same_kind(got, want, what)
    got, want = got.detach().cpu().contiguous(), want.detach().cpu().contiguous()
    if got.is_floating_point():
        view = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
        different = (got.view(view) != want.view(view)) & ~(got.isnan() & want.isnan())
    else:
        different = got != want
    n = int(different.sum())
    assert n == 0, f"{what}: {n} of {got.numel()} elements differ\n{_worst(got, want, different.float())}"


def relative_rms(got: Tensor, want: Tensor) -> float:
    """RMS of the error over RMS of the wanted values (over 1 where those are all zero)."""
    if got.numel() == 0:
        return 0.0
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    scale = float(want.square().mean().sqrt())
    return float((got - want).square().mean().sqrt()) / (scale or 1.0)


def assert_close(got: Tensor, want: Tensor, kind: str, what: str = "result") -> None:
    """Within the table's tolerance in relative RMS over the finite elements; NaN and Inf in the same places."""
    _same_kind(got, want, what)
    got, want = got.detach().cpu(), want.detach().cpu()
    if not got.is_floating_point():
        assert_same_bits(got, want, what)
        return
    finite = want.isfinite()
    special = torch.where(finite, torch.zeros_like(want), want)
    special_got = torch.where(finite & got.isfinite(), torch.zeros_like(got), got)
    assert_same_bits(special_got + 0.0, special + 0.0, f"{what} (NaN and Inf)")
    error = relative_rms(torch.where(finite, got, 0), torch.where(finite, want, 0))
    limit = TOLERANCES[want.dtype][kind]
    worst = _worst(got, want, (got.double() - want.double()).abs())
    assert error <= limit, f"{what}: relative RMS error {error:.3g} > {limit:.3g}\n{worst}"


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty and friends hand out NaN (a pattern for integers), so that an unwritten element is seen."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            if t.is_floating_point():
                t.fill_(float("nan"))
            elif t.dtype == torch.bool:
                t.view(torch.uint8).fill_(0xA5)
            else:
                t.fill_(-0x5A if t.dtype.is_signed else 0xA5)
            return t

        return run

    with (
        mock.patch.object(torch, "empty", poison(torch.empty)),
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def _strided(t: Tensor) -> Tensor:
    """The same values in a non-contiguous layout: every second element of a wider buffer, last two axes swapped."""
    if t.ndim == 0:
        return torch.stack([t, t])[0]
    wide = t.new_zeros((*t.shape[:-1], t.shape[-1] * 2))
    wide[..., ::2] = t
    view = wide[..., ::2]
    return view.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim >= 2 else view


def _offset(t: Tensor) -> Tensor:
    """The same values one element into a buffer, so that the address is not aligned."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": lambda t: t, "strided": _strided, "offset": _offset}


def map_tensors(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map_tensors(v, f) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, f) for k, v in value.items()}
    return value


def clone_tree(value: Any) -> Any:
    return map_tensors(value, lambda t: t.clone(memory_format=torch.preserve_format))


def compare(got: Any, want: Any, op: Op[..., Any], what: str) -> None:
    if isinstance(want, Tensor):
        if op.numerics == "A" or op.kind in ("selection", "assignment"):
            assert_same_bits(got, want, what)
        else:
            assert_close(got, want, op.kind, what)
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), f"{what}: {len(got)} results, want {len(want)}"
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            compare(g, w, op, f"{what}[{i}]")
    elif isinstance(want, dict):
        assert got.keys() == want.keys(), f"{what}: keys {list(got)}, want {list(want)}"
        for k in want:
            compare(got[k], want[k], op, f"{what}[{k!r}]")
    else:
        assert got == want, f"{what}: got {got!r}, want {want!r}"


def check_op(op: Op[..., Any], *, backends: list[str] | None = None, device: str = "cpu") -> int:
    """Every backend x case x dtype x layout against the reference; returns how many comparisons were made.

    Inputs that an operator changes in place are compared too. `backends` defaults to those that can run each call;
    naming one makes it an error that it can not.
    """
    assert op.cases, f"{op.name} has no cases"
    count = 0
    for case in op.cases:
        for dtype in case.dtypes:
            seed = zlib.crc32(f"{op.name}/{case.name}".encode())
            args, kwargs = case.make(torch.Generator().manual_seed(seed), dtype)
            want_inputs = clone_tree((args, kwargs))
            want = op(*want_inputs[0], backend=REFERENCE, **want_inputs[1])
            for layout, arrange in LAYOUTS.items():
                probe = map_tensors((args, kwargs), lambda t: t.to(device))
                for name in backends or [b for b in op.backends if op.why_not(b, *probe[0], **probe[1]) is None]:
                    inputs = map_tensors(clone_tree((args, kwargs)), lambda t: arrange(t).to(device))  # noqa: B023
                    what = f"{op.name} [{name}] {case.name}, {dtype}, {layout}"
                    with poisoned_empty():
                        got = op(*inputs[0], backend=name, **inputs[1])
                    compare(got, want, op, what)
                    compare(inputs, want_inputs, op, f"{what}: inputs after the call")
                    count += 1
    return count

"""highpass_filter: the frequency filter of FR-Merging on every matrix of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Call, deferred, op
from ._checks import compute_dtype, require_float, require_like, result_like
from ._highpass_cpu import Passes, Scratch, filter_matrices, held_bytes
from ._spectral_mask import SpectralMask, spectral_mask


def _checked(
    x: Tensor, cutoff: float | None, mask: str, ring_double: bool, dtype: torch.dtype | None, out: Tensor | None
) -> tuple[Tensor, SpectralMask | None]:
    """The tensor to fill, and the mask (None for an empty x)."""
    require_float("highpass_filter", x=x)
    if x.ndim < 2:
        raise ValueError(f"highpass_filter: x has shape {tuple(x.shape)}; a matrix or a batch of matrices is needed")
    height, width = x.shape[-2:]
    plan = spectral_mask(max(height, 1), max(width, 1), cutoff, mask, bool(ring_double))
    return result_like("highpass_filter", x, dtype, out), plan if x.numel() else None


@op(numerics="B", kind="fft")
def highpass_filter(
    x: Tensor,
    cutoff: float | None = None,
    *,
    mask: str = "radial",
    ring_double: bool = False,
    tf32: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Removes the low frequencies of every matrix of x: ``out = irfft2(gain · rfft2(x))``.

    Masks, on the bins (ky, kx) of an unshifted spectrum of a [H, W] matrix:

    - ``radial`` (cutoff 0.1): gain 1 where sqrt(fy² + fx²) >= cutoff, f = 2|k|/n so that Nyquist is 1, in float64;
      the paper's ideal high-pass.
    - ``disc_min`` (0.7), ``disc_max`` (0.6): gain 1 where d <= cutoff·min(H, W) (max(H, W)), d the float32 distance
      to index (H//2, W//2), which is Nyquist: what the published code does. Odd sizes make that mask asymmetric; the
      published code then takes a real part, which is the filter with gain (M(k) + M(-k))/2, and so is this.
    - ``ring_double`` (disc masks only): bins of the disc with d == min(H, W)//10 exactly get their gain doubled.

    Args:
        x: [..., H, W].
        cutoff: None takes the mask's default.
        tf32: let Triton's products on an NVIDIA GPU be one TF32 product instead of three: errors of about 1e-3 of x, for
            a third of the arithmetic. Other backends compute as without it.
        dtype: of the result; default x's.
        out: filled and returned when given; it may be x itself.

    A matrix with a NaN or an Inf becomes NaN as a whole; a mask that keeps every bin with gain 1 returns x unchanged.

    Numerics: class B on the CPU (same bits for any batch and number of threads, of one build and CPU type), tolerance
        across backends. float32 transforms (float64 for float64), rounded once to the result's dtype.
    Cost: at most one real FFT pair, about 5·HW·log2(HW) flops, less for few touched columns: only these are transformed.
        CPU workspace: the touched columns in the compute dtype (a tenth of the matrix for `radial`), and for each thread
        a block of 2^17 elements, or of 16 to 32 rows or columns where these are longer, three times over.
    Raises: TypeError for non-float tensors; ValueError for less than two axes, an unknown mask, or a bad cutoff.
    Source: FREE-Merging (arXiv:2411.16815), eq. 4-5; the published masks as in its code, without its second forward
        and third inverse transform.
    """
    result, plan = _checked(x, cutoff, mask, ring_double, dtype, out)
    if plan is None or not len(plan.columns):
        return result.copy_(x)
    compute = compute_dtype(x)
    gain = plan.gain().to(device=x.device, dtype=compute)
    value = x.to(compute)
    filtered = torch.fft.irfft2(torch.fft.rfft2(value) * gain, s=x.shape[-2:])
    finite = value.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    filtered = torch.where(finite, filtered, torch.nan)
    if torch.is_grad_enabled() and filtered.requires_grad and out is None:
        return filtered.to(result.dtype)
    return result.copy_(filtered)


@highpass_filter.backend("cpu", when=lambda x, *_, **__: _native.cpu_why_not(x))
def _highpass_filter_cpu(
    x: Tensor,
    cutoff: float | None = None,
    *,
    mask: str = "radial",
    ring_double: bool = False,
    tf32: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    result, plan = _checked(x, cutoff, mask, ring_double, dtype, out)
    if plan is None or not len(plan.columns):
        return result.copy_(x)
    dense = result if result.is_contiguous() else _native.fresh(result.shape, result.dtype)
    width = x.shape[-1]
    rows, filtered = x.reshape(-1, width), dense.view(-1, width)
    filter_matrices(rows, filtered, plan, compute_dtype(x))
    return dense if dense is result else result.copy_(dense)


def _triton_form(x, cutoff=None, *, mask="radial", ring_double=False, tf32=False, dtype=None, out=None):  # type: ignore[no-untyped-def]
    _, plan = _checked(x, cutoff, mask, ring_double, dtype, out)
    if plan is None or not len(plan.columns):
        return "a copy: nothing is removed"
    name, why = _triton.kernel("highpass_filter", "form")(plan, compute_dtype(x))
    return f"the {name} form: {why}"


@highpass_filter.backend("triton", when=lambda x, *_, **__: _triton.why_not(x), detail=_triton_form)
def _highpass_filter_triton(x, cutoff=None, *, mask="radial", ring_double=False, tf32=False, dtype=None, out=None):  # type: ignore[no-untyped-def]
    kwargs = {"mask": mask, "ring_double": ring_double, "tf32": tf32, "dtype": dtype, "out": out}
    return _highpass_filter_triton_many([((x, cutoff), kwargs)])[0]


@highpass_filter.many("triton")
def _highpass_filter_triton_many(calls: Sequence[Call]) -> list[Tensor]:
    jobs, results = [], []
    for args, kwargs in calls:
        p = highpass_filter.signature.bind(*args, **kwargs)
        p.apply_defaults()
        x, cutoff, mask, ring_double, tf32, dtype, out = p.arguments.values()
        result, plan = _checked(x, cutoff, mask, ring_double, dtype, out)
        results.append(result)
        if plan is None or not len(plan.columns):
            result.copy_(x)
            continue
        # The subtraction reads x again when part of the result is written, so `out` may not be x in the middle of it.
        dense = _dense(result, apart=result.data_ptr() == x.data_ptr())
        jobs.append((_triton.kernel("highpass_filter", "Job")([x.contiguous()], dense, plan, tf32=tf32), result))
    _launch(jobs)
    return results


def _dense(result: Tensor, *, apart: bool = False) -> Tensor:
    """`result`, or where it is strided (or apart) a contiguous tensor like it."""
    if result.is_contiguous() and not apart:
        return result
    return torch.empty(result.shape, dtype=result.dtype, device=result.device)


def _launch(jobs: Sequence[tuple[Any, Tensor]]) -> None:
    """Run (job, result) pairs; what a job filled instead of its result is copied there."""
    _triton.kernel("highpass_filter", "highpass_filter_many")([job for job, _ in jobs])
    for job, result in jobs:
        if job.out is not result:
            result.copy_(job.out)


def fuses(base: Tensor | None, models: Sequence[Tensor]) -> bool:
    """Whether :func:`fused_merge` runs for these tensors, where it has something to filter."""
    return base is not None and _triton.why_not(base, *models) is None and highpass_filter.choose(base) == "triton"


def fused_merge(
    base: Tensor,
    models: Sequence[Tensor],
    weight: Sequence[float],
    cutoff: float | None = None,
    *,
    mask: str = "radial",
    ring_double: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """base + the filtered Σ wᵢ (modelᵢ − base), matrices [..., H, W], without storing the delta; None where Triton is
    not the backend of these tensors, or nothing is filtered: then it takes weighted_sum and highpass_filter.

    Within ``Batch.deferring`` a call with a small `out` waits, as one of an operator does: matrices of a shape, mask and
    dtypes are then filtered in the same launches, with the bits of each alone.

    Numerics, cost and errors are those of :func:`highpass_filter`'s Triton backend, with the models' reads in place of
    x's; the base is added in the compute dtype and the sum rounded once.
    """
    if not fuses(base, models):
        return None
    require_like("highpass_filter", base, models)
    result, plan = _checked(base, cutoff, mask, ring_double, dtype, out)
    if plan is None or not len(plan.columns):
        return None
    call: Call = ((base, models, list(weight), plan), {"out": result})
    if out is None or not deferred(_fused_many, *call):
        _fused_many([call])
    return result


def _fused_many(calls: Sequence[Call]) -> list[Tensor]:
    jobs = []
    for (base, models, weight, plan), kwargs in calls:
        job = _triton.kernel("highpass_filter", "Job")(
            [m.contiguous() for m in models], _dense(kwargs["out"]), plan, base.contiguous(), weight, add_base=True
        )
        jobs.append((job, kwargs["out"]))
    _launch(jobs)
    return [result for _, result in jobs]


def two_passes(
    like: Tensor,
    shape: tuple[int, int],
    compute: torch.dtype,
    scratch: Scratch,
    cutoff: float | None = None,
    *,
    mask: str = "radial",
    ring_double: bool = False,
) -> Passes | None:
    """The filter of one [H, W] matrix that is fed by rows, twice, and never held; None where the CPU kernel does not
    run for tensors like `like`, or nothing is removed.

    scratch(key, numel, dtype) gives flat memory, that of the thin spectrum above all: H numbers for each touched column.

    Numerics: the bits of weighted_sum followed by :func:`highpass_filter` on the CPU.
    """
    if highpass_filter.choose(like) != "cpu":
        return None
    plan = spectral_mask(*shape, cutoff, mask, ring_double)
    return Passes(plan, compute, scratch) if len(plan.columns) else None


def bytes_held(
    shape: tuple[int, int], compute: torch.dtype, cutoff: float | None, *, mask: str, ring_double: bool
) -> int:
    """What :func:`two_passes` holds on the CPU, or, where it is None, a whole matrix with its transform."""
    whole = 3 * shape[0] * shape[1] * compute.itemsize
    plan = spectral_mask(max(shape[0], 1), max(shape[1], 1), cutoff, mask, ring_double)
    if not len(plan.columns) or _native.why_not() is not None:
        return whole
    return held_bytes(plan, compute)


def _noise(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, generator=g) * 1e-2).to(dtype)


def _case(name: str, shape: tuple[int, ...], *dtypes: torch.dtype, **kwargs: object) -> None:
    highpass_filter.case(name, *dtypes)(lambda g, dtype: ((_noise(g, dtype, *shape),), dict(kwargs)))


_case("radial, batch of even matrices", (3, 48, 80))
_case("radial, odd by odd", (57, 131))
_case("radial 0.5, tall", (301, 24), cutoff=0.5)
_case("radial 1.2, wide", (20, 222), cutoff=1.2)
_case("radial 0 is the identity", (16, 16), torch.float32, torch.bfloat16, cutoff=0.0)
_case("radial 2 removes everything", (16, 16), torch.float32, cutoff=2.0)
_case("disc_min, square", (128, 128), mask="disc_min")
_case("disc_min, tall odd, ring", (211, 64), mask="disc_min", ring_double=True)
_case("disc_min 0.9, ring only", (100, 100), torch.float32, mask="disc_min", cutoff=0.9, ring_double=True)
_case("disc_min, wide", (64, 200), mask="disc_min")
_case("disc_max, odd by even, ring", (101, 90), mask="disc_max", ring_double=True)
_case("disc_max, smaller than ten, ring", (2, 9, 7), mask="disc_max", ring_double=True)
_case("large prime factor", (1117, 12), torch.float32)
_case("one row", (1, 37), torch.float32)
_case("one column", (37, 1), torch.float32, mask="disc_min", ring_double=True)
_case("single element", (1, 1), torch.float32)
_case("empty", (2, 0, 5), torch.float32, torch.bfloat16)


@highpass_filter.case("NaN and Inf stay in their matrix", torch.float32, torch.bfloat16)
def _(g: torch.Generator, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    x = _noise(g, dtype, 4, 20, 30)
    x[1, 3, 4], x[2, 0, 0] = float("nan"), -float("inf")
    return (x,), {}

"""consensus_merge: trim, elect a sign, merge what agrees, add the base: K models in one read.

Story: bound by memory, so every stream is read once and nothing between is stored. The sign is known only after the last
model, so a program keeps both outcomes: the sum and the divisor of what would agree with + and with −, and takes one at
the end. That makes the registers independent of K, and models come in a loop over a table of addresses, which also lets
one grid serve many tensors. Two outcomes for eight elements a thread do not fit 64 registers: elections take four, and
a 16-bit stream is then read 8 bytes a thread.

What trims a model: a rule (key, index) from _select.py or from the caller, the draws of random_mask.py made in place, or
a byte mask (DELLA's ranks need a sort). Rules and L1 norms that are not given are made on the device first; the host
never waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmerge import _native

from ._jit import (
    INTERPRETING,
    MAX_UNROLLED,
    address,
    aligned,
    bits,
    block_map,
    block_size,
    divide,
    jit,
    launch,
    read,
    scalar,
    target,
    tl,
    tl_dtype,
    upload,
    warps,
    wide_dtype,
    write,
)
from ._select import Segment, select
from ._select_kernels import magnitude_key
from .random_mask import kept_at_random

ALL, RULE, WINDOW, RANDOM, BYTES = range(5)  # what trims: nothing, one rule, two rules, draws, a byte mask
SUM, COUNT, NONE = range(3)  # the election
KEEP_NONE = {torch.float32: 2**31 - 1, torch.float64: 2**63 - 1}  # a key above every key
KEEP_ALL = (-1, 0)
_HEAD = 9  # columns of a tensor: out, base, n, scale, divisor, offset, k0, k1, first program
_MODEL = 4  # columns of a model: address, byte mask, weight, limit of the draw
_FLOOR = 1e-7  # an L1 norm below counts as zero


@dataclass
class Job:
    """One merge. Exactly one of coefficients and l1 says what multiplies the deltas; trim and elect are the codes."""

    base: Tensor | None
    models: Sequence[Tensor]
    out: Tensor
    weights: Sequence[float]
    coefficients: Sequence[float] | None  # weight · factor; None: factor = ‖δ‖₁ / ‖δ'‖₁, computed here
    trim: int = ALL
    elect: int = SUM
    divisor: float | None = None  # None: not normalised; used without an election
    scale: float = 1.0
    offset: int = 0
    rules: Sequence[tuple[int, int, int, int] | None] = ()  # low and high (key, index) of each model; None: to be found
    counts: Sequence[tuple[int, int]] = ()  # how many the low and the high rule keep, for rules to be found
    key: tuple[int, int] = (0, 0)
    limits: Sequence[int] = ()
    masks: Sequence[Tensor] = field(default_factory=tuple)

    @property
    def compute(self) -> torch.dtype:
        return wide_dtype(self.base, *self.models)


@jit
def _passes(x, rule, position, BLOCK: tl.constexpr):
    """Whether a rule keeps x; `position`: the flat index of the block's first element."""
    key, offsets = magnitude_key(x), tl.arange(0, BLOCK)
    threshold = tl.load(rule).to(key.dtype)
    last = tl.maximum(tl.minimum(tl.load(rule + 1) - position, BLOCK), -1).to(tl.int32)
    return (key > threshold) | ((key == threshold) & (offsets <= last))


@jit
def _keep(x, head, model, rule, start, left, k, TRIM: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.load(head + 5) + start
    if TRIM == 1:
        keep = _passes(x, rule, position, BLOCK)
    elif TRIM == 2:
        keep = _passes(x, rule, position, BLOCK) & (_passes(x, rule + 2, position, BLOCK) == 0)
    elif TRIM == 3:
        keep = kept_at_random(tl.load(model + 3), position // 8, tl.load(head + 6), tl.load(head + 7), k, BLOCK)
    else:
        flags = tl.load(model + 1).to(tl.pointer_type(tl.uint8)) + start
        if MASKED:
            offsets = tl.arange(0, BLOCK)
            keep = tl.load(flags + offsets, mask=offsets < left, other=0) != 0
        else:
            keep = tl.load(tl.multiple_of(flags, 16) + tl.arange(0, BLOCK)) != 0
    return keep


@jit
def _block(
    head, models, rules, coefficients, K, start, left,
    TRIM: tl.constexpr, ELECT: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr,
    BASE: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK)
    if HAS_BASE:
        base = read(address(head + 1, BASE, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
    # −0 is the neutral element: 0 + −0 would be 0.
    total = tl.full((BLOCK,), -0.0, COMPUTE)
    plus = tl.zeros((BLOCK,), COMPUTE)
    minus = tl.zeros((BLOCK,), COMPUTE)
    plus_divisor = tl.zeros((BLOCK,), COMPUTE)
    minus_divisor = tl.zeros((BLOCK,), COMPUTE)
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):  # so many loads are in flight
        model = models + k * COLUMNS
        x = read(address(model, X, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
        if HAS_BASE:
            x = x - base
        u = x * scalar(tl.load(coefficients + k), COMPUTE)
        if TRIM != 0:
            u = tl.where(_keep(x, head, model, rules + 4 * k, start, left, k, TRIM, MASKED, BLOCK), u, 0.0)
        if ELECT == 1:
            total = total + ((u > 0).to(COMPUTE) - (u < 0).to(COMPUTE))
        else:
            total = total + u
        if ELECT != 2:
            # "not below" rather than "above": a NaN takes part in every election.
            for_plus, for_minus = (u <= 0) == 0, (u >= 0) == 0
            plus = plus + tl.where(for_plus, u, 0.0)
            minus = minus + tl.where(for_minus, u, 0.0)
            if NORMALIZE:
                weight = scalar(tl.load(model + 2), COMPUTE)
                plus_divisor = plus_divisor + tl.where(for_plus, weight, 0.0)
                minus_divisor = minus_divisor + tl.where(for_minus, weight, 0.0)
    if ELECT != 2:
        positive = total >= 0
        total = tl.where(positive, plus, minus)
        if NORMALIZE:
            divisor = tl.where(positive, plus_divisor, minus_divisor)
            total = divide(total, tl.where(divisor == 0, 1.0, divisor), COMPUTE)
    elif NORMALIZE:
        total = divide(total, scalar(tl.load(head + 4), COMPUTE), COMPUTE)
    total = total * scalar(tl.load(head + 3), COMPUTE)  # a scale of 1 changes no bit
    if HAS_BASE:
        total = base + total
    write(address(head, OUT, ALIGNED) + start, offsets, total, left, MASKED)


@jit(do_not_specialize=["K"])
def consensus_merge_kernel(
    head_ptr, model_ptr, rule_ptr, coefficient_ptr, owner_ptr, K,
    TRIM: tl.constexpr, ELECT: tl.constexpr, NORMALIZE: tl.constexpr, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr,
    BASE: tl.constexpr, X: tl.constexpr, OUT: tl.constexpr, ALIGNED: tl.constexpr, HEAD: tl.constexpr,
    COLUMNS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tensor = tl.load(owner_ptr + pid).to(tl.int64)
    head = head_ptr + tensor * HEAD
    models, rules = model_ptr + tensor * K * COLUMNS, rule_ptr + tensor * K * 4
    coefficients = coefficient_ptr + tensor * K
    start = (pid - tl.load(head + 8)) * BLOCK
    left = tl.load(head + 2) - start
    if left >= BLOCK:
        _block(head, models, rules, coefficients, K, start, 0, TRIM, ELECT, NORMALIZE, HAS_BASE, COMPUTE,
               BASE, X, OUT, ALIGNED, COLUMNS, UNROLL, False, BLOCK)  # fmt: skip
    else:
        _block(head, models, rules, coefficients, K, start, left.to(tl.int32), TRIM, ELECT, NORMALIZE, HAS_BASE,
               COMPUTE, BASE, X, OUT, ALIGNED, COLUMNS, UNROLL, True, BLOCK)  # fmt: skip


@jit
def _l1_block(
    head, models, rules, sums, step, K, start, left,
    TRIM: tl.constexpr, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr,
    ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK)
    if HAS_BASE:
        base = read(address(head + 1, BASE, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
    for k in tl.range(0, K):
        model = models + k * COLUMNS
        x = read(address(model, X, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
        if HAS_BASE:
            x = x - base
        size = tl.abs(x).to(tl.float64)
        keep = _keep(x, head, model, rules + 4 * k, start, left, k, TRIM, MASKED, BLOCK)
        tl.store(sums + k * step, tl.sum(size, 0))
        tl.store(sums + k * step + 1, tl.sum(tl.where(keep, size, 0.0), 0))


@jit(do_not_specialize=["K"])
def l1_norms_kernel(
    head_ptr, model_ptr, rule_ptr, owner_ptr, sum_ptr, K,
    TRIM: tl.constexpr, HAS_BASE: tl.constexpr, COMPUTE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr,
    ALIGNED: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's float64 sums of |δ| and of the kept |δ|, of every model: [K, programs, 2]."""
    pid = tl.program_id(0)
    tensor = tl.load(owner_ptr + pid).to(tl.int64)
    head = head_ptr + tensor * HEAD
    models, rules = model_ptr + tensor * K * COLUMNS, rule_ptr + tensor * K * 4
    start = (pid - tl.load(head + 8)) * BLOCK
    left = tl.load(head + 2) - start
    sums, step = sum_ptr + pid * 2, tl.num_programs(0) * 2
    if left >= BLOCK:
        _l1_block(head, models, rules, sums, step, K, start, 0, TRIM, HAS_BASE, COMPUTE, BASE, X, ALIGNED,
                  COLUMNS, False, BLOCK)  # fmt: skip
    else:
        _l1_block(head, models, rules, sums, step, K, start, left.to(tl.int32), TRIM, HAS_BASE, COMPUTE, BASE, X,
                  ALIGNED, COLUMNS, True, BLOCK)  # fmt: skip


def consensus_merge(job: Job, *, block: int | None = None) -> Tensor:
    return consensus_merge_many([job], block=block)[0]


def consensus_merge_many(jobs: Sequence[Job], *, block: int | None = None) -> list[Tensor]:
    """Fills every job's `out`, with one grid for each combination of dtypes, K, trim, election and normalisation."""
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        job.base = None if job.base is None else job.base.contiguous()
        models = [m.contiguous() for m in job.models]
        # Mixed dtypes meet in the compute dtype, which holds them all exactly.
        job.models = models if len({m.dtype for m in models}) == 1 else [m.to(job.compute) for m in models]
        key = (job.compute, job.base is None, job.base is not None and job.base.dtype, job.models[0].dtype,
               job.out.dtype, job.out.device, len(models), job.trim, job.elect, job.divisor is None,
               job.coefficients is None, aligned(job.base, *job.models, job.out, *job.masks))  # fmt: skip
        if job.out.numel():
            groups.setdefault(key, []).append(job)
    for group in groups.values():
        _launch_group(group, block)
    return [job.out for job in jobs]


def _launch_group(group: list[Job], block: int | None) -> None:
    job = group[0]
    compute, device, count = job.compute, job.out.device, len(job.models)
    block = block or block_size(compute)
    owner_host, first = block_map([j.out.numel() for j in group], block)
    owner = upload(owner_host, torch.int32, device)
    head, columns = [], []
    for j, f in zip(group, first, strict=True):
        head += [j.out.data_ptr(), 0 if j.base is None else j.base.data_ptr(), j.out.numel(), bits(j.scale, compute),
                 bits(1.0 if j.divisor is None else j.divisor, compute), j.offset, *j.key, f]  # fmt: skip
        for i, m in enumerate(j.models):
            columns += [m.data_ptr(), j.masks[i].data_ptr() if j.masks else 0, bits(j.weights[i], compute)]
            columns += [j.limits[i] if j.limits else 0]
    heads, models = upload(head, torch.int64, device), upload(columns, torch.int64, device)
    rules = _rules(group, compute)
    shared = {
        "TRIM": job.trim, "HAS_BASE": job.base is not None, "COMPUTE": tl_dtype(compute),
        "BASE": tl_dtype(compute if job.base is None else job.base.dtype), "X": tl_dtype(job.models[0].dtype),
        "ALIGNED": all(aligned(j.base, *j.models, j.out, *j.masks) for j in group), "HEAD": _HEAD, "COLUMNS": _MODEL,
        "BLOCK": block, "device": device,
    }  # fmt: skip
    if job.coefficients is not None:
        values = [bits(c, compute) for j in group for c in j.coefficients or ()]
        coefficients = upload(values, torch.int64, device)
    else:
        sums = torch.empty(count, len(owner_host), 2, dtype=torch.float64, device=device)
        launch(l1_norms_kernel, (len(owner_host),), heads, models, rules, owner, sums, count, **shared)
        coefficients = _l1_coefficients(group, sums, block, compute)
    launch(
        consensus_merge_kernel, (len(owner_host),), heads, models, rules, coefficients, owner, count,
        ELECT=job.elect, NORMALIZE=job.divisor is not None, OUT=tl_dtype(job.out.dtype),
        **_shape(job, count), **shared,
    )  # fmt: skip


def _shape(job: Job, count: int) -> dict[str, int]:
    """Models whose loads are in flight, and registers: what an H100 measured, within half the occupancy."""
    if job.elect == NONE:
        return {
            "UNROLL": 1 if job.trim == RANDOM else _at_most(count, MAX_UNROLLED),
            "num_warps": warps(4),
            "maxnreg": 64,
        }
    spare = job.divisor is None and job.trim != RANDOM
    return {
        "UNROLL": 1 if job.trim == RANDOM else _at_most(count, 2),
        "num_warps": warps(8),
        "maxnreg": 48 if spare else 64,
    }


def _at_most(count: int, unrolled: int) -> int:
    return min(count, unrolled if INTERPRETING or target().backend == "cuda" else 2)


def _rules(group: list[Job], compute: torch.dtype) -> Tensor:
    """int64 [tensors · K, 4] on the device: (key, index) below which an element goes, and from which on it goes."""
    none = (KEEP_NONE[compute], -1)
    known: list[int] = []
    segments: list[Segment] = []
    slots: list[int] = []
    for job in group:
        n = job.out.numel()
        for i, model in enumerate(job.models):
            given = job.rules[i] if job.rules else None
            if given is not None:
                known += [min(v, none[0]) for v in given]  # KEEP_NONE of 64 bits, in the width of the key
                continue
            for k in job.counts[i] if job.counts else (n, 0):
                if 0 < k < n:
                    segments.append(Segment(job.base, model, k))
                    slots.append(len(known) // 2)
                known += KEEP_ALL if k >= n else none
    rules = upload(known, torch.int64, group[0].out.device).view(-1, 4)
    if segments:
        select(segments, rules.view(-1, 2), slots)
    return rules


def _l1_coefficients(group: list[Job], sums: Tensor, block: int, compute: torch.dtype) -> Tensor:
    """Bits of weight · ‖δ‖₁ / ‖δ'‖₁ of every tensor and model; the factor is 1 where a norm is below 1e-7."""
    device = sums.device
    if len(group) == 1:
        norms = sums.sum(1)[None]  # [tensors, K, 2]
    else:  # each tensor's programs in a row of their own, ended with zeros: the order of the sum is fixed
        counts = torch.tensor([-(-j.out.numel() // block) for j in group], device="cpu")
        program = torch.arange(int(counts.max()), device="cpu")[None, :]
        place = program + (counts.cumsum(0) - counts)[:, None]
        inside = program < counts[:, None]
        where = upload(torch.where(inside, place, sums.shape[1]), torch.int64, device)
        norms = torch.nn.functional.pad(sums, (0, 0, 0, 1))[:, where].sum(2).transpose(0, 1)
    whole, part = norms.unbind(-1)
    factor = torch.where((whole < _FLOOR) | (part < _FLOOR), 1.0, whole / part)
    weights = torch.tensor([j.weights for j in group], dtype=torch.float64, device="cpu")
    weights = _native.to_device(weights, device) if device.type == "cuda" else weights
    product = (weights * factor).to(compute).reshape(-1)
    return product.view(torch.int64 if compute == torch.float64 else torch.int32).to(torch.int64)

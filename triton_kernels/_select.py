"""Exact selection: the k-th largest magnitude of each of many segments, on the device, without the host waiting.

Story. A segment is a tensor, a row, or the delta of a model. The integer of |x|'s bits orders as |x| does; a rule (key,
index) keeps what is above key, and of what is equal the elements up to index, so rules order totally. Three steps:

1. Two programs a segment draw a sample of 16384 elements into registers; each finds a rule 4.5 standard deviations to one
   side of the wanted one, by bisection on the bits (Floyd and Rivest's idea).
2. One read of the data *collects* what is between the two: key and index of a few per cent are copied to a list, and what
   is above is counted. No work but two comparisons and a scan is done for an element. For large segments the same is done
   once more with the list.
3. One program a segment holds the last list in registers and finds the exact rule by bisection; among equals, on the index.

A mask is made on the way: `collect` sets what is above, and of the list those that the rule keeps are set at the end. So
data is read once. A sample that misleads (once in 100000 draws, whatever the data: one element of each of equal pieces, at
a scattered place) is found out on the device; whole_kernel then counts digits of all data, exact and slow.

Every choice is made on the device, so the launches are the same whatever the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._jit import INTERPRETING, aligned, block_map, launch, target, tl_dtype, triton, upload, warps, wide_dtype
from ._select_kernels import bracket_kernel, collect_kernel, mask_kernel, refine_kernel, settle_kernel, whole_kernel

SAMPLE = 16384  # elements of a sample, 64 a thread; half of it in float64
ROOM = 32768  # elements that settle_kernel holds; half of it in float64
_SMALL = 2048  # a smaller settle_kernel, for tensors of at most so many elements
_DEVIATIONS = 4.5  # as in _select_kernels
_COLUMNS, _STATE, _LEVELS = 16, 16, 4
_WIDE = 1 << 31  # elements from which on indices have 64 bits
_GRID, _PART = 256, 2048  # programs that share a list, and what they take of it at a time


class Segment(NamedTuple):
    """The values x - base (x without a base), flat and contiguous, of which the k largest are wanted, 0 < k < n."""

    base: Tensor | None
    x: Tensor
    k: int
    mask: Tensor | None = None  # uint8 [n], to be filled with what is kept; all segments of a call have one, or none


def _between(share: float, sample: int) -> float:
    """The largest share of a list (or of the data) that a sample leaves between its two rules."""
    spread = _DEVIATIONS * math.sqrt(sample * share * (1 - share)) + 3
    return min(1.0, 2.25 * spread / sample)


def _room(n: int, sample: int) -> int:
    """Of the list of what a sample leaves of n elements: a quarter more than is expected."""
    return min(n, int(1.25 * n * _between(0.5, sample)) + 512)


def levels(n: int, k: int, double: bool) -> int:
    """How many times the candidates are narrowed down before settle_kernel holds them, with 15 % to spare."""
    room, sample = (ROOM // 2, SAMPLE // 2) if double else (ROOM, SAMPLE)
    if n <= room:
        return 0
    expected, level = n * _between(k / n, sample), 1
    while expected > 0.85 * room and level < _LEVELS:
        expected, level = expected * _between(0.5, sample), level + 1
    return level


def select(segments: Sequence[Segment], rules: Tensor, slots: Sequence[int], *, block: int | None = None) -> None:
    """Writes the rule of segment i into rules[slots[i]] (int64 [..., 2], contiguous): (key, index)."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (base, x, k, _) in enumerate(segments):
        compute, n = wide_dtype(base, x), x.numel()
        depth = levels(n, k, compute == torch.float64)
        key = (compute, base is not None and base.dtype, x.dtype, aligned(base, x), depth,
               n <= _SMALL)  # fmt: skip
        groups.setdefault(key, []).append(i)
    for (_, _, _, _, depth, _), members in groups.items():
        _select_group([segments[i] for i in members], rules, [slots[i] for i in members], int(depth), block)  # type: ignore[call-overload]


def _select_group(segments: list[Segment], rules: Tensor, slots: Sequence[int], depth: int, block: int | None) -> None:
    base, x, _, mask = segments[0]
    compute, device = wide_dtype(base, x), x.device
    double = compute == torch.float64
    sizes = [s.x.numel() for s in segments]
    size = SAMPLE // 2 if double else SAMPLE
    largest = max(sizes)
    block = block or ((1 << 14) if INTERPRETING else 2048 if double else 4096)
    owner, first = block_map(sizes, block)
    # The table, the state and the owners go in one copy.
    count = len(segments)
    rows: list[int] = []
    at = 0
    for s, n, f, slot in zip(segments, sizes, first, slots, strict=True):
        row = [0 if s.base is None else s.base.data_ptr(), s.x.data_ptr(), n, s.k, f]
        row += [0 if s.mask is None else s.mask.data_ptr(), slot]
        room = n
        for _ in range(depth):
            room = _room(room, size)
            row += [room, at]
            at += room
        rows += row + [0] * (_COLUMNS - len(row))
    owners = len(owner) if depth else 0
    host = torch.zeros(count * (_COLUMNS + _STATE) + (owners + 1) // 2, dtype=torch.int64, device="cpu")
    host[: count * _COLUMNS] = torch.tensor(rows, dtype=torch.int64, device="cpu")
    host[count * (_COLUMNS + _STATE) :].view(torch.int32)[:owners] = owner[:owners]
    table, state, drawn = upload(host, torch.int64, device).split([count * _COLUMNS, count * _STATE, (owners + 1) // 2])
    wide = largest >= _WIDE
    key = torch.empty(at, dtype=torch.int64 if double else torch.int32, device=device)
    index = torch.empty(at, dtype=torch.int64 if wide else torch.int32, device=device)
    data = {
        "HAS_BASE": base is not None, "BASE": tl_dtype(x.dtype if base is None else base.dtype),
        "X": tl_dtype(x.dtype), "COMPUTE": tl_dtype(compute),
        "ALIGNED": all(aligned(s.base, s.x) for s in segments), "device": device,
    }  # fmt: skip
    mask_alignment = 0 if mask is None else 16 if all(aligned(s.mask) for s in segments) else 1
    nvidia = INTERPRETING or target().backend == "cuda"
    one = {"num_warps": warps(8 if nvidia else 32), **data}
    top = 63 if double else 31
    low = {torch.bfloat16: 16, torch.float16: 13}.get(x.dtype, 0) if base is None else 0  # bits that are always 0
    bits = max(1, (largest - 1).bit_length())
    sample = {"TOP": top, "LOW": low, "SAMPLE": size, "LOG": size.bit_length() - 1}
    for level in range(depth):
        launch(bracket_kernel, (count, 2), table, state, key, index, bits, LEVEL=level, **sample, **one)
        if level == 0:
            launch(collect_kernel, (owners,), table, drawn.view(torch.int32), state, key, index, MASK=mask_alignment,
                   ROWS=block // 16, num_warps=warps(block // (256 if double else 512)), maxnreg=48 if base is None and not double else 64, **data)  # fmt: skip
        else:
            programs = min(_GRID, triton.cdiv(largest // 16**level, _PART))
            launch(refine_kernel, (programs, count), table, state, key, index, LEVEL=level, ROWS=_PART // 16,
                   num_warps=warps(4), device=device)  # fmt: skip
    room = ROOM // 2 if double else ROOM
    if largest <= _SMALL:
        room, one["num_warps"] = _SMALL, warps(4)
    launch(
        settle_kernel, (count,), table, state, rules, key, index, bits, LEVEL=depth, TOP=top, LOW=low, ROOM=room, **one
    )
    if depth:
        launch(whole_kernel, (count,), table, state, rules, bits, TOP=top, BLOCK=2048, **{**one, "num_warps": warps(4)})
    if mask is not None:
        launch(mask_kernel, (min(8 * _GRID, triton.cdiv(largest, _PART)), count), table, state, key, index,
               LEVEL=depth, BLOCK=_PART, num_warps=warps(8), maxnreg=64, **data)  # fmt: skip

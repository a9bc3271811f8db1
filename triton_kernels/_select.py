"""Exact selection: the k-th largest magnitude of each of many segments, on the device, without the host waiting.

Story (radix selection). A segment is a tensor, a row, or the delta of a model. The integer of |x|'s bits orders as |x|
does, so the k-th largest is found digit by digit, 12 bits first: one pass over the data counts the digits (a histogram in
each block, then atomics on the segment's 4096 counters), one program per segment picks the digit where the count from
above reaches k. A second pass copies the few elements of that bin aside (a few per cent of real weights); the remaining
digits, then the index among equals, are counted on those alone. Where the bin holds too many to copy (a constant tensor)
the same kernels read the data again instead. Every choice is made on the device, so the launches are the same whatever
the data: two reads of the data for a threshold, a third for the mask.

The result is a rule (key, index) for each segment: keep where key(x) > key, or equal and the element's index <= index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._jit import INTERPRETING, address, aligned, block_map, jit, launch, read, tl, tl_dtype, upload, warps, wide_dtype

BINS = 4096
_COLUMNS = tl and tl.constexpr(6)  # of the segment table: base, x, n, capacity, first candidate, first program
_STATE = tl and tl.constexpr(8)  # of the state: key, left, matched, matched by the first digit, index, done, stored, -


class Segment(NamedTuple):
    """The values x - base (x without a base), flat and contiguous, of which the k largest are wanted, 0 < k < n."""

    base: Tensor | None
    x: Tensor
    k: int


@jit
def magnitude_key(x):
    """The integer that orders as |x| does; every NaN is one key above Inf. int32 of float32, int64 of float64."""
    if x.dtype == tl.float64:
        key = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        key = tl.where(x != x, 0x7FF8000000000000, key)
    else:
        key = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        key = tl.where(x != x, 0x7FC00000, key)
    return key


@jit
def _keys(
    row, start, offsets, left, HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    x = read(address(row + 1, X, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
    if HAS_BASE:
        x = x - read(address(row, BASE, ALIGNED) + start, offsets, left, COMPUTE, MASKED)
    return magnitude_key(x)


@jit
def _count(counters, value, ok, shift, width, BINS: tl.constexpr):
    digit = ((value >> shift) & ((1 << width) - 1)).to(tl.int32)
    found = tl.histogram(digit, BINS, mask=ok)
    tl.atomic_add(counters + tl.arange(0, BINS), found.to(counters.dtype.element_ty), mask=found > 0)


@jit(do_not_specialize=["shift", "width"])
def count_digit_kernel(
    table_ptr, owner_ptr, state_ptr, counter_ptr, key_ptr, index_ptr, shift, width,
    FIRST: tl.constexpr, ON_INDEX: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts one digit of the key (or of the complement of the index) of the elements that are still candidates."""
    pid = tl.program_id(0)
    segment = tl.load(owner_ptr + pid).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * BINS
    start = (pid - tl.load(row + 5)) * BLOCK
    left = tl.load(row + 2) - start
    offsets = tl.arange(0, BLOCK)
    if FIRST:
        if left >= BLOCK:
            key = _keys(row, start, offsets, 0, HAS_BASE, BASE, X, COMPUTE, ALIGNED, False)
            _count(counters, key, None, shift, width, BINS)
        else:
            key = _keys(row, start, offsets, left.to(tl.int32), HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
            _count(counters, key, offsets < left, shift, width, BINS)
    elif tl.load(state + 5) == 0:
        prefix = tl.load(state).to(key_ptr.dtype.element_ty)
        chosen = tl.load(state + 4)
        stored = tl.load(state + 3)
        copied = stored <= tl.load(row + 3)
        if copied:
            left = stored - start
        if left > 0:
            ok = offsets < left
            if copied:
                at = tl.load(row + 4) + start
                key = tl.load(key_ptr + at + offsets, mask=ok, other=0)
            else:
                key = _keys(row, start, offsets, left, HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
            if ON_INDEX:
                index = start + offsets
                if copied:
                    index = tl.load(index_ptr + tl.load(row + 4) + index, mask=ok, other=0).to(tl.int64)
                ok = ok & (key == prefix) & (((~index) >> (shift + width)) == (chosen >> (shift + width)))
                _count(counters, ~index, ok, shift, width, BINS)
            else:
                ok = ok & ((key >> (shift + width)) == (prefix >> (shift + width)))
                _count(counters, key, ok, shift, width, BINS)


@jit(do_not_specialize=["shift"])
def pick_digit_kernel(
    table_ptr, state_ptr, counter_ptr, shift, FIRST: tl.constexpr, LAST_OF_KEY: tl.constexpr, ON_INDEX: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """One program a segment: the digit at which the count from above reaches what is left of k."""
    segment = tl.program_id(0).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    digit = BINS - 1 - tl.arange(0, BINS)
    if tl.load(state + 5) == 0:
        left = tl.load(state + 1)
        found = tl.load(counter_ptr + segment * BINS + digit).to(tl.int64)
        tl.store(counter_ptr + segment * BINS + digit, tl.zeros_like(digit).to(counter_ptr.dtype.element_ty))
        reached = tl.cumsum(found, 0)
        hit = (reached >= left) & (reached - found < left)
        chosen = tl.sum(tl.where(hit, digit, 0), 0).to(tl.int64) << shift
        matched = tl.sum(tl.where(hit, found, 0), 0)
        left = left - tl.sum(tl.where(hit, reached - found, 0), 0)
        tl.store(state + 1, left)
        tl.store(state + 2, matched)
        if FIRST:
            tl.store(state + 3, matched)
        if ON_INDEX:
            tl.store(state + 4, tl.load(state + 4) | chosen)
        else:
            tl.store(state, tl.load(state) | chosen)
        if LAST_OF_KEY and left == matched:  # all that are equal to the threshold are kept
            tl.store(state + 4, ~(tl.load(row + 2) - 1))
            tl.store(state + 5, 1)


@jit(do_not_specialize=["shift"])
def copy_candidates_kernel(
    table_ptr, owner_ptr, state_ptr, key_ptr, index_ptr, shift,
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies key and index of the elements of the first digit's bin aside, in no particular order of blocks."""
    pid = tl.program_id(0)
    segment = tl.load(owner_ptr + pid).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    if tl.load(state + 3) <= tl.load(row + 3):
        start = (pid - tl.load(row + 5)) * BLOCK
        left = tl.load(row + 2) - start
        offsets = tl.arange(0, BLOCK)
        if left >= BLOCK:
            key = _keys(row, start, offsets, 0, HAS_BASE, BASE, X, COMPUTE, ALIGNED, False)
        else:
            key = _keys(row, start, offsets, left.to(tl.int32), HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
        ok = (offsets < left) & ((key >> shift) == (tl.load(state) >> shift).to(key.dtype))
        place = tl.cumsum(ok.to(tl.int32), 0)
        at = tl.atomic_add(state + 6, tl.sum(ok.to(tl.int32), 0).to(tl.int64))
        at = tl.load(row + 4) + at - 1
        tl.store(key_ptr + at + place, key, mask=ok)
        tl.store(index_ptr + at + place, (start + offsets).to(index_ptr.dtype.element_ty), mask=ok)


def _digits(compute: torch.dtype, short: bool) -> list[tuple[int, int]]:
    """(shift, width) of the key's digits. `short`: 16-bit values without a base leave the last bits zero."""
    if compute == torch.float64:
        return [(51, 12), (39, 12), (27, 12), (15, 12), (3, 12), (0, 3)]
    return [(19, 12), (8, 11)] if short else [(19, 12), (8, 11), (0, 8)]


def select(segments: Sequence[Segment], rules: Tensor, slots: Sequence[int], *, block: int | None = None) -> None:
    """Writes the rule of segment i into rules[slots[i]] (int64 [..., 2]): (key, index)."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (base, x, _) in enumerate(segments):
        key = (wide_dtype(base, x), base is not None and base.dtype, x.dtype, aligned(base, x))
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        state = _select_group([segments[i] for i in members], block)
        where = upload([slots[i] for i in members], torch.int64, rules.device)
        rules[where] = torch.stack([state[:, 0], ~state[:, 4]], dim=1)


def _select_group(segments: list[Segment], block: int | None) -> Tensor:
    base, x, _ = segments[0]
    compute, device = wide_dtype(base, x), x.device
    sizes = [s.x.numel() for s in segments]
    block = block or ((1 << 17) if INTERPRETING else (2048 if compute == torch.float64 else 4096))
    owner_host, first = block_map(sizes, block)
    owner = upload(owner_host, torch.int32, device)
    # A bin holds a few per cent of the elements of a bell-shaped tensor; where it holds more, the data is read again.
    room = [n // 16 + 256 for n in sizes]
    rows, at = [], 0
    for s, n, r, f in zip(segments, sizes, room, first, strict=True):
        rows += [0 if s.base is None else s.base.data_ptr(), s.x.data_ptr(), n, r, at, f]
        at += r
    table = upload(rows, torch.int64, device)
    start = torch.zeros(len(segments), 8, dtype=torch.int64)
    start[:, 1] = torch.tensor([s.k for s in segments])
    start[:, 4] = -(1 << max(1, (max(sizes) - 1).bit_length()))  # complement of an index: the bits above are all ones
    state = upload(start, torch.int64, device)
    wide = max(sizes) >= 1 << 31
    counters = torch.zeros(len(segments), BINS, dtype=torch.int64 if wide else torch.int32, device=device)
    key = torch.empty(at, dtype=torch.int64 if compute == torch.float64 else torch.int32, device=device)
    index = torch.empty(at, dtype=torch.int64 if wide else torch.int32, device=device)
    data = {
        "HAS_BASE": base is not None, "BASE": tl_dtype(x.dtype if base is None else base.dtype),
        "X": tl_dtype(x.dtype), "COMPUTE": tl_dtype(compute),
        "ALIGNED": all(aligned(s.base, s.x) for s in segments), "BLOCK": block,
    }  # fmt: skip

    def decide(shift: int, width: int, *, is_first: bool, is_last: bool, on_index: bool) -> None:
        launch(count_digit_kernel, (len(owner_host),), table, owner, state, counters, key, index, shift, width,
               FIRST=is_first, ON_INDEX=on_index, BINS=BINS, num_warps=warps(16), maxnreg=64, device=device, **data)  # fmt: skip
        launch(pick_digit_kernel, (len(segments),), table, state, counters, shift, FIRST=is_first,
               LAST_OF_KEY=is_last, ON_INDEX=on_index, BINS=BINS, num_warps=8, device=device)  # fmt: skip

    digits = _digits(compute, base is None and x.element_size() == 2)
    for i, (shift, width) in enumerate(digits):
        decide(shift, width, is_first=i == 0, is_last=i == len(digits) - 1, on_index=False)
        if i == 0:
            launch(copy_candidates_kernel, (len(owner_host),), table, owner, state, key, index, shift,
                   num_warps=warps(16), maxnreg=64, device=device, **data)  # fmt: skip
    bits_left = max(1, (max(sizes) - 1).bit_length())
    while bits_left:
        width = min(12, bits_left)
        bits_left -= width
        decide(bits_left, width, is_first=False, is_last=False, on_index=True)
    return state

"""Exact selection: the k-th largest magnitude of each of many segments, on the device, without the host waiting.

Story. A segment is a tensor, a row, or the delta of a model. The integer of |x|'s bits orders as |x| does. Three steps:

1. A range of keys that holds the k-th one. Usually the bin of a histogram of the first 12 bits: one read of the data. For
   large segments a sample brackets it instead (Floyd and Rivest's idea): runs of 8 neighbours, one in each of equal pieces
   at a scattered place, are read twice to find the sample's two keys 3.5 standard deviations around the wanted rank.
2. One read *collects* the range: key and index of its elements are copied aside (a few per cent of real weights), their
   next 12 bits are counted in the same pass, and, after a sample, so is everything above the range. If the bracket missed
   (5 in 10000 draws, more where neighbours are alike) the same kernels start over with the histogram; if the range holds
   too many to copy (a constant tensor) the later steps read the data again instead.
3. The remaining digits, then the index among equals, are counted on the few candidates.

Every choice is made on the device, so the launches are the same whatever the data. The mask is one more read: 3 in all, or
2 after a sample, and 3 to 12 % of one for the candidates.

The result is a rule (key, index) for each segment: keep where key(x) > key, or equal and the element's index <= index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._jit import (
    INTERPRETING,
    address,
    aligned,
    block_map,
    jit,
    launch,
    read,
    target,
    tl,
    tl_dtype,
    upload,
    warps,
    wide_dtype,
)

BINS = 4096  # 12 bits a digit
SAMPLED = 1 << 24  # elements from which on a segment is sampled: a read of 64 MB costs about the 8 more launches
_RUN = 8  # neighbours read for a sample: a 32-byte sector of float32
_DEVIATIONS = 3.5
_FIRST = tl and tl.constexpr(6)  # column of the segment's first program
_SAMPLE = tl and tl.constexpr(7)  # columns of the sample: stride of its runs, ranks of its ends, first program
_COLUMNS = tl and tl.constexpr(11)  # base, x, n, room, first candidate, k, first program, and those four
# The state: what is chosen of the key above the range's begin, how many are left to find, how many matched so far, the
# complement of the chosen index, done, copied candidates (an atomic counter), elements above the range (another), the
# range's first and last key, its number of bits, whether the histogram is needed, the two ends' first digits and ranks.
_CHOSEN, _LEFT, _MATCHED, _INDEX, _DONE, _COPIED, _ABOVE, _BEGIN, _END, _BITS, _WHOLE, _ENDS = (
    tl and tl.constexpr(i) for i in range(12)
) if tl else (None,) * 12  # fmt: skip
_STATE = tl and tl.constexpr(16)


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
def _count(counters, digit, ok, BINS: tl.constexpr):
    found = tl.histogram((digit & (BINS - 1)).to(tl.int32), BINS, mask=ok)
    tl.atomic_add(counters + tl.arange(0, BINS), found.to(counters.dtype.element_ty), mask=found > 0)


@jit
def _pick(counters, left, CLEAR: tl.constexpr, BINS: tl.constexpr):
    """(the digit at which the count from above reaches `left`, how many have it, how many are above); 0 for left = 0."""
    digit = BINS - 1 - tl.arange(0, BINS)
    found = tl.load(counters + digit)
    if CLEAR:  # by the threads that read
        tl.store(counters + digit, tl.zeros_like(found))
    found = found.to(tl.int64)
    reached = tl.cumsum(found, 0)
    hit = (reached >= left) & (reached - found < left)
    matched = tl.sum(tl.where(hit, found, 0), 0)
    return tl.sum(tl.where(hit, digit, 0), 0).to(tl.int64), matched, tl.sum(tl.where(hit, reached - found, 0), 0)


@jit
def _keep_equals(row, state):
    """All elements that are equal to the threshold are kept: the last index, and nothing more to decide."""
    tl.store(state + _INDEX, ~(tl.load(row + 2) - 1))
    tl.store(state + _DONE, 1)


# ------------------------------------------------------------------------------------------------------- the bracket


@jit
def sample_kernel(
    table_ptr, owner_ptr, state_ptr, counter_ptr, SECOND: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr,
    X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, TOP: tl.constexpr, BINS: tl.constexpr,
    RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts a digit of the sample: the first, or the second of what shares the first with either end."""
    pid = tl.program_id(0)
    segment = tl.load(owner_ptr + pid).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    counters = counter_ptr + segment * 2 * BINS
    stride = tl.load(row + _SAMPLE)  # runs of the data for each run of the sample
    run = (pid - tl.load(row + _SAMPLE + 3)).to(tl.int32) * (BLOCK // RUN) + tl.arange(0, BLOCK // RUN)
    scatter = ((run * 0x2545F491) >> 8) & 0xFFFFFF  # against data whose period is the stride
    place = (run * stride + ((scatter * stride) >> 24)) * RUN
    offsets = (place[:, None] + tl.arange(0, RUN)[None, :]).reshape(BLOCK)
    key = _keys(row, 0, offsets, 0, HAS_BASE, BASE, X, COMPUTE, ALIGNED, False)
    if SECOND:
        for end in tl.range(0, 2):  # not unrolled: a histogram takes most registers of an AMD thread
            first = tl.load(state_ptr + segment * _STATE + _ENDS + 2 * end)
            _count(counters + end * BINS, key >> (TOP - 24), (key >> (TOP - 12)) == first, BINS)
    else:
        _count(counters, key >> (TOP - 12), None, BINS)


@jit
def bracket_kernel(table_ptr, state_ptr, counter_ptr, SECOND: tl.constexpr, TOP: tl.constexpr, BINS: tl.constexpr):
    """One program a segment: a digit of the two ends; after the second one, the range between them."""
    segment = tl.program_id(0).to(tl.int64)
    row = table_ptr + segment * _COLUMNS + _SAMPLE + 1
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    if SECOND:
        high, _, _ = _pick(counters, tl.load(state + _ENDS + 1), True, BINS)
        low, _, _ = _pick(counters + BINS, tl.load(state + _ENDS + 3), True, BINS)
        high = (((tl.load(state + _ENDS) << 12) | high) << (TOP - 24)) | ((1 << (TOP - 24)) - 1)
        high = tl.where(tl.load(row) == 0, (1 << TOP) - 1, high)  # rank 0: the sample has none above
        low = ((tl.load(state + _ENDS + 2) << 12) | low) << (TOP - 24)  # rank 0: 0
        tl.store(state + _BEGIN, low)
        tl.store(state + _END, high)
        tl.store(state + _BITS, tl.sum((((high - low) >> tl.arange(0, 64).to(tl.int64)) > 0).to(tl.int64), 0))
    else:
        for end in tl.static_range(2):
            rank = tl.load(row + end)
            digit, _, above = _pick(counters, rank, end == 1, BINS)
            tl.store(state + _ENDS + 2 * end, digit)
            tl.store(state + _ENDS + 2 * end + 1, rank - above)


# ------------------------------------------------------------------------------------- the range, and what is in it


@jit
def histogram_kernel(
    table_ptr, owner_ptr, state_ptr, counter_ptr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, TOP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the first digit of all elements, unless a bracket holds."""
    pid = tl.program_id(0)
    segment = tl.load(owner_ptr + pid).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    if tl.load(state_ptr + segment * _STATE + _WHOLE) != 0:
        start = (pid - tl.load(row + _FIRST)) * BLOCK
        left = tl.load(row + 2) - start
        offsets = tl.arange(0, BLOCK)
        if left >= BLOCK:
            key = _keys(row, start, offsets, 0, HAS_BASE, BASE, X, COMPUTE, ALIGNED, False)
            _count(counter_ptr + segment * 2 * BINS, key >> (TOP - 12), None, BINS)
        else:
            key = _keys(row, start, offsets, left.to(tl.int32), HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
            _count(counter_ptr + segment * 2 * BINS, key >> (TOP - 12), offsets < left, BINS)


@jit
def bin_kernel(table_ptr, state_ptr, counter_ptr, TOP: tl.constexpr, BINS: tl.constexpr):
    """One program a segment: the bin of the histogram that holds the k-th key becomes the range."""
    segment = tl.program_id(0).to(tl.int64)
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    if tl.load(state + _WHOLE) != 0:
        k = tl.load(table_ptr + segment * _COLUMNS + 5)
        digit, _, above = _pick(counters, k, True, BINS)
        tl.store(state + _LEFT, k - above)
        tl.store(state + _BEGIN, digit << (TOP - 12))
        tl.store(state + _END, ((digit + 1) << (TOP - 12)) - 1)
        tl.store(state + _BITS, TOP - 12)
        tl.store(state + _COPIED, 0)


@jit
def _collect(
    key, ok, row, state, counters, key_ptr, index_ptr, start, COUNT_ABOVE: tl.constexpr, NARROW: tl.constexpr,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, end = tl.load(state + _BEGIN).to(key.dtype), tl.load(state + _END).to(key.dtype)
    if COUNT_ABOVE:
        tl.atomic_add(state + _ABOVE, tl.sum((ok & (key > end)).to(tl.int32), 0).to(tl.int64))
    inside = ok & (key >= begin) & (key <= end)
    value = key - begin
    _count(counters, value >> tl.maximum(tl.load(state + _BITS) - 12, 0).to(key.dtype), inside, BINS)
    place = tl.cumsum(inside.to(tl.int32), 0)
    at = tl.atomic_add(state + _COPIED, tl.sum(inside.to(tl.int32), 0).to(tl.int64)) - 1
    room = tl.load(row + 3) - at  # where there is none the data is read again later
    if NARROW:
        room = tl.minimum(room, BLOCK + 1).to(tl.int32)
    inside = inside & (place < room)
    at += tl.load(row + 4)
    tl.store(key_ptr + at + place, value, mask=inside)
    tl.store(index_ptr + at + place, (start + tl.arange(0, BLOCK)).to(index_ptr.dtype.element_ty), mask=inside)


@jit
def collect_kernel(
    table_ptr, owner_ptr, state_ptr, counter_ptr, key_ptr, index_ptr, BRACKET: tl.constexpr, NARROW: tl.constexpr,
    HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies key and index of the range's elements aside, counts their first 12 bits, and what lies above a bracket."""
    pid = tl.program_id(0)
    segment = tl.load(owner_ptr + pid).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    needed = tl.load(state + _WHOLE)
    if BRACKET:
        needed = 1 - needed
    if needed != 0:
        start = (pid - tl.load(row + _FIRST)) * BLOCK
        left = tl.load(row + 2) - start
        offsets = tl.arange(0, BLOCK)
        if left >= BLOCK:
            key = _keys(row, start, offsets, 0, HAS_BASE, BASE, X, COMPUTE, ALIGNED, False)
        else:
            key = _keys(row, start, offsets, left.to(tl.int32), HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
        _collect(key, offsets < left, row, state, counters, key_ptr, index_ptr, start, BRACKET, NARROW, BINS, BLOCK)


@jit
def first_digit_kernel(
    table_ptr, state_ptr, counter_ptr, BRACKET: tl.constexpr, LAST: tl.constexpr, BINS: tl.constexpr
):
    """One program a segment: the range's first digit; or that the bracket missed, and the histogram is needed."""
    segment = tl.program_id(0).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    needed = tl.load(state + _WHOLE)
    if BRACKET:
        needed = 1 - needed
    if needed != 0:
        left = tl.load(state + _LEFT)
        if BRACKET:
            left = tl.load(row + 5) - tl.load(state + _ABOVE)
            missed = (left <= 0) | (left > tl.load(state + _COPIED))
            tl.store(state + _WHOLE, missed.to(tl.int64))
        digit, matched, above = _pick(counters, left, True, BINS)
        left -= above
        tl.store(state + _CHOSEN, digit << tl.maximum(tl.load(state + _BITS) - 12, 0))
        tl.store(state + _LEFT, left)
        tl.store(state + _MATCHED, matched)
        if LAST and left == matched:
            _keep_equals(row, state)


# ------------------------------------------------------------------------------------------------- the other digits


@jit(do_not_specialize=["passed", "shift"])
def count_digit_kernel(
    table_ptr, owner_ptr, state_ptr, counter_ptr, key_ptr, index_ptr, passed, shift,
    ON_INDEX: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the candidates, counts the digit after `passed` bits of the key; ON_INDEX: bits [shift, passed) of ~index."""
    pid = tl.program_id(0)
    segment = tl.load(owner_ptr + pid).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    high = tl.maximum(tl.load(state + _BITS) - passed, 0)  # bits of the key that are not decided yet
    if (tl.load(state + _DONE) == 0) & ((high > 0) | ON_INDEX):
        start = (pid - tl.load(row + _FIRST)) * BLOCK
        left = tl.load(row + 2) - start
        held = tl.load(state + _COPIED)
        copied = held <= tl.load(row + 3)
        if copied:
            left = held - start
        if left > 0:
            offsets = tl.arange(0, BLOCK)
            ok = offsets < left
            if copied:
                value = tl.load(key_ptr + tl.load(row + 4) + start + offsets, mask=ok, other=0)
            else:
                key = _keys(row, start, offsets, left, HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
                ok = ok & (key >= tl.load(state + _BEGIN).to(key.dtype)) & (key <= tl.load(state + _END).to(key.dtype))
                value = key - tl.load(state + _BEGIN).to(key.dtype)
            chosen = tl.load(state + _CHOSEN).to(value.dtype)
            if ON_INDEX:
                index = start + offsets
                if copied:
                    index = tl.load(index_ptr + tl.load(row + 4) + index, mask=ok, other=0).to(tl.int64)
                ok = ok & (value == chosen) & (((~index) >> passed) == (tl.load(state + _INDEX) >> passed))
                _count(counters, ((~index) >> shift) & ((1 << (passed - shift)) - 1), ok, BINS)
            else:
                low = tl.maximum(high - 12, 0)
                ok = ok & ((value >> high.to(value.dtype)) == (chosen >> high.to(value.dtype)))
                _count(counters, (value >> low.to(value.dtype)) & ((1 << (high - low)) - 1).to(value.dtype), ok, BINS)


@jit(do_not_specialize=["passed", "shift"])
def pick_digit_kernel(
    table_ptr, state_ptr, counter_ptr, passed, shift, LAST: tl.constexpr, ON_INDEX: tl.constexpr, BINS: tl.constexpr
):
    """One program a segment: the digit at which the count from above reaches what is left of k."""
    segment = tl.program_id(0).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    if tl.load(state + _DONE) == 0:
        high = tl.maximum(tl.load(state + _BITS) - passed, 0)
        left, matched = tl.load(state + _LEFT), tl.load(state + _MATCHED)
        if (high > 0) | ON_INDEX:
            digit, matched, above = _pick(counters, left, True, BINS)
            left -= above
            tl.store(state + _LEFT, left)
            tl.store(state + _MATCHED, matched)
            if ON_INDEX:
                tl.store(state + _INDEX, tl.load(state + _INDEX) | (digit << shift))
            else:
                tl.store(state + _CHOSEN, tl.load(state + _CHOSEN) | (digit << tl.maximum(high - 12, 0)))
        if LAST and left == matched:
            _keep_equals(row, state)


# --------------------------------------------------------------------------------------------------------- launchers


def select(
    segments: Sequence[Segment], rules: Tensor, slots: Sequence[int], *, block: int | None = None,
    sampled: bool | None = None,
) -> None:  # fmt: skip
    """Writes the rule of segment i into rules[slots[i]] (int64 [..., 2]): (key, index).

    `sampled`: bracket by a sample; None: segments of SAMPLED elements and more.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (base, x, _) in enumerate(segments):
        sample = x.numel() >= SAMPLED if sampled is None else sampled and x.numel() >= 2 * BINS
        key = (wide_dtype(base, x), base is not None and base.dtype, x.dtype, aligned(base, x), sample)
        groups.setdefault(key, []).append(i)
    for key, members in groups.items():
        state = _select_group([segments[i] for i in members], block, bool(key[4]))
        where = upload([slots[i] for i in members], torch.int64, rules.device)
        rules[where] = torch.stack([state[:, 0] + state[:, 7], ~state[:, 3]], dim=1)


class _Sample(NamedTuple):
    """A sample of `blocks` programs: the data's runs for each of its runs, and the sample's ranks that bracket k."""

    blocks: int
    stride: int
    high: int  # 0: nothing is above
    low: int  # 0: nothing is below


def _sample(n: int, k: int, block: int) -> _Sample:
    """The size that makes least traffic: m elements read twice, against candidates that fall as 1 / sqrt(m)."""
    m = min(n // 2, round(1.64 * n ** (2 / 3)))
    blocks = max(1, -(-m // block)) if n >= 2 * block else 1
    m = blocks * block
    share = k / n
    spread = _DEVIATIONS * math.sqrt(m * share * (1 - share)) + 1
    high, low = math.floor(share * m - spread), math.ceil(share * m + spread)
    return _Sample(blocks, n // _RUN // (m // _RUN), max(0, high), low if low <= m else 0)


def _select_group(segments: list[Segment], block: int | None, sampled: bool) -> Tensor:
    base, x, _ = segments[0]
    compute, device = wide_dtype(base, x), x.device
    sizes = [s.x.numel() for s in segments]
    top = 63 if compute == torch.float64 else 31
    sample_block = block or ((1 << 12) if INTERPRETING else (2048 if compute == torch.float64 else 4096))
    block = block or ((1 << 17) if INTERPRETING else (2048 if compute == torch.float64 else 4096))
    owner_host, first = block_map(sizes, block)
    owner = upload(owner_host, torch.int32, device)
    # A range holds a few per cent of the elements of a bell-shaped tensor; where it holds more, the data is read again.
    room = [n // 16 + 256 for n in sizes]
    samples = [
        _sample(n, s.k, sample_block) if sampled else _Sample(0, 0, 0, 0) for s, n in zip(segments, sizes, strict=True)
    ]
    sample_owner, sample_first = block_map([s.blocks * sample_block for s in samples], sample_block)
    rows, at = [], 0
    for s, n, r, f, sample, g in zip(segments, sizes, room, first, samples, sample_first, strict=True):
        rows += [0 if s.base is None else s.base.data_ptr(), s.x.data_ptr(), n, r, at, s.k, f]
        rows += [sample.stride, sample.high, sample.low, g]
        at += r
    table = upload(rows, torch.int64, device)
    start = torch.zeros(len(segments), 16, dtype=torch.int64)
    start[:, 3] = -(1 << max(1, (max(sizes) - 1).bit_length()))  # complement of an index: the bits above are all ones
    start[:, 10] = int(not sampled)
    state = upload(start, torch.int64, device)
    wide = max(sizes) >= 1 << 31
    counters = torch.zeros(len(segments), 2, BINS, dtype=torch.int64 if wide else torch.int32, device=device)
    key = torch.empty(at, dtype=torch.int64 if compute == torch.float64 else torch.int32, device=device)
    index = torch.empty(at, dtype=torch.int64 if wide else torch.int32, device=device)
    data = {
        "HAS_BASE": base is not None, "BASE": tl_dtype(x.dtype if base is None else base.dtype),
        "X": tl_dtype(x.dtype), "COMPUTE": tl_dtype(compute),
        "ALIGNED": all(aligned(s.base, s.x) for s in segments), "BINS": BINS, "num_warps": warps(16), "maxnreg": 64,
        "device": device,
    }  # fmt: skip
    # Comparing places in 32 bits saves registers on NVIDIA; AMD's compiler spills with them.
    narrow = INTERPRETING or target().backend == "cuda"
    one = {"BINS": BINS, "num_warps": 8, "device": device}
    whole, each = (len(owner_host),), (len(segments),)
    # 16-bit values without a base end in at least 13 zero bits: no digit is needed there.
    digits = -(-((top if sampled else top - 12) - (13 if base is None and x.element_size() == 2 else 0)) // 12)
    if sampled:
        drawn = upload(sample_owner, torch.int32, device)
        for second in (False, True):
            launch(sample_kernel, (len(sample_owner),), table, drawn, state, counters, SECOND=second, TOP=top, RUN=_RUN,
                   BLOCK=sample_block, **data)  # fmt: skip
            launch(bracket_kernel, each, table, state, counters, SECOND=second, TOP=top, **one)
        launch(
            collect_kernel,
            whole,
            table,
            owner,
            state,
            counters,
            key,
            index,
            BRACKET=True,
            NARROW=narrow,
            BLOCK=block,
            **data,
        )
        launch(first_digit_kernel, each, table, state, counters, BRACKET=True, LAST=False, **one)
    launch(histogram_kernel, whole, table, owner, state, counters, TOP=top, BLOCK=block, **data)
    launch(bin_kernel, each, table, state, counters, TOP=top, **one)
    launch(
        collect_kernel,
        whole,
        table,
        owner,
        state,
        counters,
        key,
        index,
        BRACKET=False,
        NARROW=narrow,
        BLOCK=block,
        **data,
    )
    launch(first_digit_kernel, each, table, state, counters, BRACKET=False, LAST=digits == 1, **one)

    def decide(passed: int, shift: int, *, is_last: bool, on_index: bool) -> None:
        launch(count_digit_kernel, whole, table, owner, state, counters, key, index, passed, shift, ON_INDEX=on_index,
               BLOCK=block, **data)  # fmt: skip
        launch(pick_digit_kernel, each, table, state, counters, passed, shift, LAST=is_last, ON_INDEX=on_index, **one)

    for i in range(1, digits):
        decide(12 * i, 0, is_last=i == digits - 1, on_index=False)
    bits_left = max(1, (max(sizes) - 1).bit_length())
    while bits_left > 0:
        decide(bits_left, max(0, bits_left - 12), is_last=False, on_index=True)
        bits_left -= 12
    return state

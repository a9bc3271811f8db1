"""The device code of exact selection; _select.py tells the story and launches it.

Counting is done by blocks of the data, picking a digit by one program a segment. What differs between the launches of a
picking kernel is a run-time flag: each is compiled once.
"""

from __future__ import annotations

from ._jit import address, jit, read, tl

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
def _count(counters, digit, ok, BINS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Counts how often each digit occurs, AT_ONCE bins at a time: an AMD thread has a register for every 64."""
    digit = (digit & (BINS - 1)).to(tl.int32)
    if AT_ONCE == BINS:
        found = tl.histogram(digit, BINS, mask=ok)
        tl.atomic_add(counters + tl.arange(0, BINS), found.to(counters.dtype.element_ty), mask=found > 0)
    else:
        for part in tl.range(0, BINS // AT_ONCE):
            here = digit // AT_ONCE == part
            if ok is not None:
                here = here & ok
            found = tl.histogram(digit % AT_ONCE, AT_ONCE, mask=here)
            bins = part * AT_ONCE + tl.arange(0, AT_ONCE)
            tl.atomic_add(counters + bins, found.to(counters.dtype.element_ty), mask=found > 0)


@jit
def _pick(counters, left, clear, BINS: tl.constexpr):
    """(the digit at which the count from above reaches `left`, how many have it, how many are above); 0 for left = 0."""
    digit = BINS - 1 - tl.arange(0, BINS)
    found = tl.load(counters + digit)
    if clear:  # by the threads that read
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
    AT_ONCE: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
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
            _count(counters + end * BINS, key >> (TOP - 24), (key >> (TOP - 12)) == first, BINS, AT_ONCE)
    else:
        _count(counters, key >> (TOP - 12), None, BINS, AT_ONCE)


@jit(do_not_specialize=["second", "ends"])
def bracket_kernel(table_ptr, state_ptr, counter_ptr, second, ends, TOP: tl.constexpr, BINS: tl.constexpr):
    """One program a segment: a digit of the two ends; after the second one, the range between them.

    `ends` is 2; were it a constant the loop would be unrolled, into twice the registers.
    """
    segment = tl.program_id(0).to(tl.int64)
    row = table_ptr + segment * _COLUMNS + _SAMPLE + 1
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    found = tl.full((), 0, tl.int64)
    for end in tl.range(0, ends):  # both ends share the first digit's counters
        first, left = state + _ENDS + 2 * end, state + _ENDS + 2 * end + 1
        rank = tl.load(tl.where(second != 0, left, row + end))
        digit, _, above = _pick(counters + second * end * BINS, rank, (second != 0) | (end == 1), BINS)
        if second != 0:
            digit = (tl.load(first) << 12) | digit
        found = (found << 24) | digit
        tl.store(first, digit)
        tl.store(left, rank - above)
    if second != 0:
        high = ((found >> 24) << (TOP - 24)) | ((1 << (TOP - 24)) - 1)
        high = tl.where(tl.load(row) == 0, (1 << TOP) - 1, high)  # rank 0: the sample has none above
        low = (found & 0xFFFFFF) << (TOP - 24)  # rank 0: 0
        tl.store(state + _BEGIN, low)
        tl.store(state + _END, high)
        tl.store(state + _BITS, tl.sum((((high - low) >> tl.arange(0, 64).to(tl.int64)) > 0).to(tl.int64), 0))


# ------------------------------------------------------------------------------------- the range, and what is in it


@jit
def histogram_kernel(
    table_ptr, owner_ptr, state_ptr, counter_ptr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, TOP: tl.constexpr, BINS: tl.constexpr,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
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
            _count(counter_ptr + segment * 2 * BINS, key >> (TOP - 12), None, BINS, AT_ONCE)
        else:
            key = _keys(row, start, offsets, left.to(tl.int32), HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
            _count(counter_ptr + segment * 2 * BINS, key >> (TOP - 12), offsets < left, BINS, AT_ONCE)


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
    BINS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    begin, end = tl.load(state + _BEGIN).to(key.dtype), tl.load(state + _END).to(key.dtype)
    if COUNT_ABOVE:
        tl.atomic_add(state + _ABOVE, tl.sum((ok & (key > end)).to(tl.int32), 0).to(tl.int64))
    inside = ok & (key >= begin) & (key <= end)
    value = key - begin
    _count(counters, value >> tl.maximum(tl.load(state + _BITS) - 12, 0).to(key.dtype), inside, BINS, AT_ONCE)
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
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
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
        _collect(
            key, offsets < left, row, state, counters, key_ptr, index_ptr, start, BRACKET, NARROW, BINS, AT_ONCE, BLOCK
        )


@jit(do_not_specialize=["bracket", "last"])
def first_digit_kernel(table_ptr, state_ptr, counter_ptr, bracket, last, BINS: tl.constexpr):
    """One program a segment: the range's first digit; or that the bracket missed, and the histogram is needed."""
    segment = tl.program_id(0).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    if (tl.load(state + _WHOLE) == 0) == (bracket != 0):
        left = tl.load(state + _LEFT)
        if bracket != 0:
            left = tl.load(row + 5) - tl.load(state + _ABOVE)
            missed = (left <= 0) | (left > tl.load(state + _COPIED))
            tl.store(state + _WHOLE, missed.to(tl.int64))
        digit, matched, above = _pick(counters, left, True, BINS)
        left -= above
        tl.store(state + _CHOSEN, digit << tl.maximum(tl.load(state + _BITS) - 12, 0))
        tl.store(state + _LEFT, left)
        tl.store(state + _MATCHED, matched)
        if (last != 0) & (left == matched):
            _keep_equals(row, state)


# ------------------------------------------------------------------------------------------------- the other digits


@jit(do_not_specialize=["passed", "shift"])
def count_digit_kernel(
    table_ptr, owner_ptr, state_ptr, counter_ptr, key_ptr, index_ptr, passed, shift,
    ON_INDEX: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BINS: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
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
                _count(counters, ((~index) >> shift) & ((1 << (passed - shift)) - 1), ok, BINS, AT_ONCE)
            else:
                low = tl.maximum(high - 12, 0)
                ok = ok & ((value >> high.to(value.dtype)) == (chosen >> high.to(value.dtype)))
                _count(
                    counters,
                    (value >> low.to(value.dtype)) & ((1 << (high - low)) - 1).to(value.dtype),
                    ok,
                    BINS,
                    AT_ONCE,
                )


@jit(do_not_specialize=["passed", "shift", "last", "on_index"])
def pick_digit_kernel(table_ptr, state_ptr, counter_ptr, passed, shift, last, on_index, BINS: tl.constexpr):
    """One program a segment: the digit at which the count from above reaches what is left of k."""
    segment = tl.program_id(0).to(tl.int64)
    row = table_ptr + segment * _COLUMNS
    state = state_ptr + segment * _STATE
    counters = counter_ptr + segment * 2 * BINS
    if tl.load(state + _DONE) == 0:
        high = tl.maximum(tl.load(state + _BITS) - passed, 0)
        left, matched = tl.load(state + _LEFT), tl.load(state + _MATCHED)
        if (high > 0) | (on_index != 0):
            digit, matched, above = _pick(counters, left, True, BINS)
            left -= above
            tl.store(state + _LEFT, left)
            tl.store(state + _MATCHED, matched)
            if on_index != 0:
                tl.store(state + _INDEX, tl.load(state + _INDEX) | (digit << shift))
            else:
                tl.store(state + _CHOSEN, tl.load(state + _CHOSEN) | (digit << tl.maximum(high - 12, 0)))
        if (last != 0) & (left == matched):
            _keep_equals(row, state)

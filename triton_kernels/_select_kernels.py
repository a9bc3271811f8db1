"""The device code of exact selection; _select.py tells the story and launches it.

What is decided by one program runs on chip: values in registers, a count over all of them for each bit.
"""

from __future__ import annotations

from ._jit import address, jit, read, tl

# A segment's row of the table: base, x, n, k, first program, mask, slot of its rule, and of each level's list the room
# and the place of the first element.
_N, _K, _FIRST, _MASK, _SLOT, _LISTS = (tl and tl.constexpr(i) for i in range(2, 8)) if tl else (None,) * 6
_COLUMNS = tl and tl.constexpr(16)
# Its state: the rules (key, index) of the bracket's two ends, the rule that was found, whether the lists did not serve,
# and of each level how many were copied and how many lie above (atomic counters; below 2^31 elements one holds both, the
# latter from bit 32 on: all programs of a segment meet there).
_HIGH, _LOW, _FOUND, _WHOLE, _COPIED, _ABOVE = (tl and tl.constexpr(i) for i in (0, 2, 4, 6, 8, 12)) if tl else (None,) * 6  # fmt: skip
_STATE = tl and tl.constexpr(16)
DEVIATIONS = tl and tl.constexpr(4.5)  # of the sample's rank, on both sides of the wanted one
DIGIT = tl and tl.constexpr(256)


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
def bisect(value, bits, low, least, most):
    """A threshold v with least <= count(value >= v) <= most, bit by bit from above: (v, 1, how many are above).

    Where the bits end first: (the largest v that more than `most` reach, 0, how many are above it).
    """
    v = tl.full((), 0, value.dtype)
    one = tl.full((), 1, value.dtype)
    above = tl.full((), 0, tl.int32)
    hit = tl.full((), 0, tl.int32)
    bit = bits - 1
    while bit >= low:
        trial = v | (one << bit.to(value.dtype))
        # The sign of a difference: two instructions an element, against three of a comparison. Values are at least -1.
        if value.dtype == tl.int64:
            below = (value - trial).to(tl.uint64, bitcast=True) >> 63
        else:
            below = (value - trial).to(tl.uint32, bitcast=True) >> 31
        reached = value.numel - tl.sum(below.to(tl.int32), 0)
        if reached >= least:
            v = trial
            if reached <= most:
                hit = hit + 1
                bit = low
        else:
            above = reached
        bit = bit - 1
    return v, hit, above


@jit
def kept(key, index, rule):
    """Whether the rule keeps the elements: the key above its key, or equal and the index not after its index."""
    threshold = tl.load(rule).to(key.dtype)
    return (key > threshold) | ((key == threshold) & (index <= tl.load(rule + 1)))


@jit
def kept_here(key, offsets, start, rule, BLOCK: tl.constexpr):
    """`kept` for the block that begins at `start`, with 32-bit places."""
    threshold = tl.load(rule).to(key.dtype)
    last = tl.maximum(tl.minimum(tl.load(rule + 1) - start, BLOCK), -1).to(tl.int32)
    return (key > threshold) | ((key == threshold) & (offsets <= last))


@jit
def _tally(state, index_ptr, LEVEL: tl.constexpr):
    """Of a level: (how many were copied, how many lie above)."""
    copied = tl.load(state + _COPIED + LEVEL)
    if index_ptr.dtype.element_ty == tl.int64:
        above = tl.load(state + _ABOVE + LEVEL)
    else:
        above = copied >> 32
        copied = copied & 0xFFFFFFFF
    return copied, above


@jit
def _standing(row, state, index_ptr, LEVEL: tl.constexpr):
    """After LEVEL lists: (how many are wanted of the last one, its length, whether it holds what it has to hold)."""
    left, count = tl.load(row + _K), tl.load(row + _N)
    fine = left > 0
    for level in tl.static_range(LEVEL):
        count, above = _tally(state, index_ptr, level)
        left -= above
        fine = fine & (left >= 1) & (left <= count) & (count <= tl.load(row + _LISTS + 2 * level))
    return left, count, fine


@jit
def _bits(span):
    """The number of bits of a span >= 0."""
    return tl.sum(((span >> tl.arange(0, 64).to(tl.int64)) > 0).to(tl.int32), 0)


# ------------------------------------------------------------------------------------------------------- the bracket


@jit
def _places(count, index_ptr, SAMPLE: tl.constexpr, LOG: tl.constexpr):
    """One place in each of SAMPLE equal pieces of [0, count), scattered by a hash."""
    piece = tl.arange(0, SAMPLE).to(tl.uint32)
    mixed = (piece ^ count.to(tl.uint32)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    share = (piece << (32 - LOG)) | (mixed >> LOG)  # of 2^32
    if index_ptr.dtype.element_ty == tl.int64:
        place = ((share >> 8).to(tl.int64) * count) >> 24
    else:
        place = tl.umulhi(share, count.to(tl.uint32)).to(tl.int32, bitcast=True)
    return place


@jit(do_not_specialize=["index_bits"])
def bracket_kernel(
    table_ptr, state_ptr, key_ptr, index_ptr, index_bits, LEVEL: tl.constexpr, TOP: tl.constexpr, LOW: tl.constexpr,
    SAMPLE: tl.constexpr, LOG: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr,
    COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One end of a segment's bracket: a rule that keeps less (the low end: more) than the wanted one, from a sample.

    The sample is one element of each of SAMPLE equal pieces, at a scattered place of it: its count of anything deviates
    at most as an independent sample's would, however the data are arranged.
    """
    segment, is_low = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, state = table_ptr + segment * _COLUMNS, state_ptr + segment * _STATE
    left, count, fine = _standing(row, state, index_ptr, LEVEL)
    if fine:
        place = _places(count, index_ptr, SAMPLE, LOG)
        if LEVEL == 0:
            if HAS_BASE:
                # One after the other, in a loop that is not unrolled: registers do not hold the addresses of both.
                x = tl.zeros((SAMPLE,), COMPUTE)
                for operand in tl.range((tl.load(row) == 0).to(tl.int32), 2):
                    if operand == 0:
                        x = read(address(row, BASE, ALIGNED), place, 0, COMPUTE, False)
                    else:
                        x = read(address(row + 1, X, ALIGNED), place, 0, COMPUTE, False) - x
                key = magnitude_key(x)
            else:
                key = _keys(row, 0, place, 0, False, BASE, X, COMPUTE, ALIGNED, False)
        else:
            begin = tl.load(row + _LISTS + 2 * LEVEL - 1)
            key = tl.load(key_ptr + begin + place)
        share = left.to(tl.float32) / count.to(tl.float32)
        spread = DEVIATIONS * tl.sqrt(SAMPLE * share * (1 - share)) + 2
        slack = (spread * 0.125).to(tl.int32)  # fewer bits to decide, for a few more candidates
        if is_low != 0:
            least = (share * SAMPLE + spread).to(tl.int32) + 1
            most = least + slack
        else:
            most = (share * SAMPLE - spread).to(tl.int32)
            least = tl.maximum(most - slack, 0)
        none = tl.full((), 0x7FFFFFFF if TOP == 31 else 0x7FFFFFFFFFFFFFFF, tl.int64)
        all_below, all_above = (is_low == 0) & (most < 1), (is_low != 0) & (most >= SAMPLE)
        found_key, found_index = tl.where(all_above, -1, none), tl.full((), -1, tl.int64)
        if (all_below | all_above) == 0:
            v, hit, above = bisect(key, tl.full((), TOP, tl.int32), LOW, least, most)
            found_key = v.to(tl.int64) - (
                is_low | hit
            )  # all of this key belong to the low end, and none to the high one
            if hit == 0:  # so many are equal that they have to be divided, at an index
                one = tl.full((), 1, index_ptr.dtype.element_ty)
                last = (one << index_bits.to(one.dtype)) - 1
                if LEVEL == 0:  # the places are made anew here too
                    again = _places(tl.load(row + _N, volatile=True), index_ptr, SAMPLE, LOG)
                    behind = tl.where(key == v, last - again, -1)
                else:
                    again = _places(
                        tl.load(state + _COPIED + LEVEL - 1, volatile=True) & 0xFFFFFFFF, index_ptr, SAMPLE, LOG
                    )
                    behind = last - tl.load(index_ptr + begin + again, mask=key == v, other=last + 1)
                cut, divided, _ = bisect(behind, index_bits, 0, least - above, most - above)
                if divided != 0:
                    found_key = v.to(tl.int64)
                    found_index = (last - cut).to(tl.int64)
        tl.store(state + 2 * is_low, found_key)
        tl.store(state + 2 * is_low + 1, found_index)


# ---------------------------------------------------------------------------------------- what is between, and above


@jit
def _ones(bits):
    """How many of 16 bits are set."""
    bits = bits - ((bits >> 1) & 0x5555)
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits + (bits >> 4)) & 0x0F0F
    return (bits + (bits >> 8)) & 0x1F


@jit
def _put(
    high, low, row, state, key_ptr, index_ptr, start, LEVEL: tl.constexpr, ROWS: tl.constexpr, HAS_BASE: tl.constexpr,
    BASE: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Copies what the low end keeps and the high end does not to the level's list, and counts what the high one keeps.

    high, low: [ROWS, 16]. They are few: a row keeps them as bits, and all rows copy their first, second, ... one, which is
    read again, at the same time.
    """
    bit = (tl.full((), 1, tl.int32) << tl.arange(0, 16))[None, :]
    above = tl.sum(tl.where(high, bit, 0), 1)
    between = tl.sum(tl.where(low, bit, 0), 1) & ~above
    many = _ones(between)
    found = tl.sum((many << 16) + _ones(above), 0)
    copied, higher = (found >> 16).to(tl.int64), (found & 0xFFFF).to(tl.int64)
    if index_ptr.dtype.element_ty == tl.int64:
        tl.atomic_add(state + _ABOVE + LEVEL, higher, sem="relaxed")
        at = tl.atomic_add(state + _COPIED + LEVEL, copied, sem="relaxed")
    else:
        at = tl.atomic_add(state + _COPIED + LEVEL, copied | (higher << 32), sem="relaxed") & 0xFFFFFFFF
    if copied > 0:
        place = tl.cumsum(many, 0) - many
        room = tl.minimum(tl.maximum(tl.load(row + _LISTS + 2 * LEVEL) - at, 0), 16 * ROWS).to(tl.int32)
        at += tl.load(row + _LISTS + 2 * LEVEL + 1)
        for _ in tl.range(0, tl.max(many, 0)):
            some = between != 0
            column = _ones((between & -between) - 1)
            position = tl.where(some, tl.arange(0, ROWS) * 16 + column, 16 * ROWS)
            if LEVEL == 0:
                key = _keys(row, start, position, 16 * ROWS, HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
                index = start.to(index_ptr.dtype.element_ty) + position
            else:
                listed = tl.load(row + _LISTS + 2 * LEVEL - 1) + start
                key = tl.load(key_ptr + listed + position, mask=some, other=0)
                index = tl.load(index_ptr + listed + position, mask=some, other=0)
            fits = some & (place < room)
            tl.store(key_ptr + at + place, key, mask=fits)
            tl.store(index_ptr + at + place, index, mask=fits)
            place += 1
            between = between & (between - 1)


@jit
def _divides(rule, start, BLOCK: tl.constexpr):
    """Whether the index of a rule lies within the block: all before its last element."""
    last = tl.load(rule + 1) - start
    return (last >= 0) & (last < BLOCK - 1)


@jit
def _threshold(rule, start, BLOCK: tl.constexpr):
    """Of a rule that does not divide the block: it keeps what is above this key."""
    return tl.load(rule) - (tl.load(rule + 1) - start >= BLOCK - 1).to(tl.int64)


@jit
def _collect(
    row, state, key_ptr, index_ptr, start, left, MASK: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr,
    X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, ANY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block; a full one that no rule divides unless ANY."""
    BLOCK: tl.constexpr = 16 * ROWS
    offsets = tl.arange(0, ROWS)[:, None] * 16 + tl.arange(0, 16)[None, :]
    key = _keys(row, start, offsets, left, HAS_BASE, BASE, X, COMPUTE, ALIGNED, ANY)
    if ANY:
        key = tl.where(offsets < left, key, -2)  # which no rule keeps
        high = kept_here(key, offsets, start, state + _HIGH, BLOCK)
        low = kept_here(key, offsets, start, state + _LOW, BLOCK)
    else:
        high = key > _threshold(state + _HIGH, start, BLOCK).to(key.dtype)
        low = key > _threshold(state + _LOW, start, BLOCK).to(key.dtype)
    if MASK != 0:
        mask = address(row + _MASK, tl.uint8, MASK == 16) + start
        if ANY:
            tl.store(mask + offsets, high.to(tl.uint8), mask=offsets < left)
        else:
            tl.store(mask + offsets, high.to(tl.uint8))
    _put(high, low, row, state, key_ptr, index_ptr, start, 0, ROWS, HAS_BASE, BASE, X, COMPUTE, ALIGNED)


@jit
def collect_kernel(
    table_ptr, owner_ptr, state_ptr, key_ptr, index_ptr, MASK: tl.constexpr, HAS_BASE: tl.constexpr,
    BASE: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The read of all data: what is between the ends to the first list, what is above counted, and set in the mask."""
    BLOCK: tl.constexpr = 16 * ROWS
    pid = tl.program_id(0)
    segment = tl.load(owner_ptr + pid).to(tl.int64)
    row, state = table_ptr + segment * _COLUMNS, state_ptr + segment * _STATE
    start = (pid - tl.load(row + _FIRST)) * BLOCK
    left = tl.minimum(tl.load(row + _N) - start, BLOCK).to(tl.int32)
    if (left < BLOCK) | _divides(state + _HIGH, start, BLOCK) | _divides(state + _LOW, start, BLOCK):
        _collect(row, state, key_ptr, index_ptr, start, left, MASK, HAS_BASE, BASE, X, COMPUTE, ALIGNED, True, ROWS)
    else:
        _collect(row, state, key_ptr, index_ptr, start, left, MASK, HAS_BASE, BASE, X, COMPUTE, ALIGNED, False, ROWS)


@jit
def refine_kernel(table_ptr, state_ptr, key_ptr, index_ptr, LEVEL: tl.constexpr, ROWS: tl.constexpr):
    """From the list before to the list of LEVEL."""
    segment = tl.program_id(1).to(tl.int64)
    row, state = table_ptr + segment * _COLUMNS, state_ptr + segment * _STATE
    _, count, fine = _standing(row, state, index_ptr, LEVEL)
    if fine:
        begin = tl.load(row + _LISTS + 2 * LEVEL - 1)
        offsets = tl.arange(0, ROWS)[:, None] * 16 + tl.arange(0, 16)[None, :]
        for start in tl.range(
            tl.program_id(0).to(tl.int64) * 16 * ROWS, count, tl.num_programs(0).to(tl.int64) * 16 * ROWS
        ):
            left = tl.minimum(count - start, 16 * ROWS).to(tl.int32)
            key = tl.load(key_ptr + begin + start + offsets, mask=offsets < left, other=-2)
            index = tl.load(index_ptr + begin + start + offsets, mask=offsets < left, other=0)
            high, low = kept(key, index, state + _HIGH), kept(key, index, state + _LOW)
            _put(high, low, row, state, key_ptr, index_ptr, start, LEVEL, ROWS, False, None, None, None, False)


# -------------------------------------------------------------------------------------------------------- the finish


@jit
def _digit(
    row, n, left, key, index, last, shift, ON_INDEX: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr,
    X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of all data: (the eight bits from `shift` on, of the key or of last - index, of the wanted element; the count above).

    `key` and `index` hold the bits above.
    """
    counts = tl.zeros((DIGIT,), tl.int64)
    for start in tl.range(0, n, BLOCK):
        offsets = tl.arange(0, BLOCK)
        left_here = tl.minimum(n - start, BLOCK).to(tl.int32)
        value = _keys(row, start, offsets, left_here, HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
        ok = offsets < left_here
        if ON_INDEX:
            ok = ok & (value == key)
            behind = last - start - offsets
            ok = ok & ((behind >> shift >> 8) == (index >> shift >> 8))
            digit = (behind >> shift).to(tl.int32)
        else:
            ok = ok & ((value >> shift >> 8) == (key >> shift >> 8))
            digit = (value >> shift).to(tl.int32)
        counts += tl.histogram(digit & (DIGIT - 1), DIGIT, mask=ok).to(tl.int64)
    from_above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    hit = (from_above < left) & (from_above + counts >= left)
    return tl.sum(tl.where(hit, tl.arange(0, DIGIT), 0), 0), tl.sum(tl.where(hit, from_above, 0), 0)


@jit(do_not_specialize=["index_bits"])
def whole_kernel(
    table_ptr, state_ptr, rule_ptr, index_bits, TOP: tl.constexpr, HAS_BASE: tl.constexpr,
    BASE: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a bracket missed: eight bits of the key, then of the index, for each read of the data, by one program."""
    segment = tl.program_id(0).to(tl.int64)
    row, state = table_ptr + segment * _COLUMNS, state_ptr + segment * _STATE
    if tl.load(state + _WHOLE) != 0:
        n, left = tl.load(row + _N), tl.load(row + _K)
        key = tl.full((), 0, tl.int64 if TOP == 63 else tl.int32)
        index = tl.full((), 0, tl.int64)
        last = (tl.full((), 1, tl.int64) << index_bits) - 1
        shift = tl.full((), (TOP - 1) // 8 * 8, key.dtype)
        while shift >= 0:
            digit, above = _digit(
                row, n, left, key, index, last, shift, False, HAS_BASE, BASE, X, COMPUTE, ALIGNED, BLOCK
            )
            key = key | (digit.to(key.dtype) << shift)
            left -= above
            shift -= 8
        shift_index = tl.full((), 0, tl.int64) + (index_bits - 1) // 8 * 8
        while shift_index >= 0:
            digit, above = _digit(
                row, n, left, key, index, last, shift_index, True, HAS_BASE, BASE, X, COMPUTE, ALIGNED, BLOCK
            )
            index = index | (digit.to(tl.int64) << shift_index)
            left -= above
            shift_index -= 8
        _found(row, state, rule_ptr, key.to(tl.int64), last - index)


@jit
def _found(row, state, rule_ptr, key, index):
    tl.store(state + _FOUND, key)
    tl.store(state + _FOUND + 1, index)
    slot = tl.load(row + _SLOT)
    tl.store(rule_ptr + 2 * slot, key)
    tl.store(rule_ptr + 2 * slot + 1, index)


@jit(do_not_specialize=["index_bits"])
def settle_kernel(
    table_ptr, state_ptr, rule_ptr, key_ptr, index_ptr, index_bits, LEVEL: tl.constexpr, TOP: tl.constexpr, LOW: tl.constexpr,
    ROOM: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, X: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The rule of a segment from its last list, or from the data where LEVEL is 0; or that it needs whole_kernel."""
    segment = tl.program_id(0).to(tl.int64)
    row, state = table_ptr + segment * _COLUMNS, state_ptr + segment * _STATE
    left, count, fine = _standing(row, state, index_ptr, LEVEL)
    if fine & (count <= ROOM):
        offsets, wanted = tl.arange(0, ROOM), left.to(tl.int32)
        here = offsets < count.to(tl.int32)
        if LEVEL == 0:
            key = _keys(row, 0, offsets, count.to(tl.int32), HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
            first = tl.full((), 0, key.dtype)
            bits = tl.full((), TOP, tl.int32)
        else:
            at = tl.load(row + _LISTS + 2 * LEVEL - 1)
            key = tl.load(key_ptr + at + offsets, mask=here, other=0)
            lowest = tl.maximum(tl.load(state + _LOW), 0) >> LOW << LOW
            first = lowest.to(key.dtype)
            bits = _bits(tl.load(state + _HIGH) - lowest)
        value = tl.where(here, key - first, -1)
        v, hit, above = bisect(value, bits, LOW, wanted, wanted)
        found_key = (first + v).to(tl.int64) - hit
        found_index = tl.full((), -1, tl.int64)
        if hit == 0:  # ties
            one = tl.full((), 1, index_ptr.dtype.element_ty)
            last = (one << index_bits.to(one.dtype)) - 1
            if LEVEL == 0:
                behind = tl.where(value == v, last - offsets, -1)
            else:
                behind = last - tl.load(index_ptr + at + offsets, mask=value == v, other=last + 1)
            cut, _, _ = bisect(behind, index_bits, 0, wanted - above, wanted - above)
            found_index = (last - cut).to(tl.int64)
        _found(row, state, rule_ptr, found_key, found_index)
    else:
        tl.store(state + _WHOLE, tl.full((), 1, tl.int64))


@jit
def mask_kernel(
    table_ptr, state_ptr, key_ptr, index_ptr, LEVEL: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr,
    X: tl.constexpr, COMPUTE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sets the mask of what was between the ends; writes all of it where there is no list that serves."""
    segment = tl.program_id(1).to(tl.int64)
    row, state = table_ptr + segment * _COLUMNS, state_ptr + segment * _STATE
    mask = address(row + _MASK, tl.uint8, False)
    offsets = tl.arange(0, BLOCK)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    if (LEVEL == 0) | (tl.load(state + _WHOLE) != 0):
        n = tl.load(row + _N)
        for start in tl.range(begin, n, step):
            left = tl.minimum(n - start, BLOCK).to(tl.int32)
            key = _keys(row, start, offsets, left, HAS_BASE, BASE, X, COMPUTE, ALIGNED, True)
            keep = kept_here(key, offsets, start, state + _FOUND, BLOCK)
            tl.store(mask + start + offsets, keep.to(tl.uint8), mask=offsets < left)
    else:
        count, _ = _tally(state, index_ptr, 0)
        at = tl.load(row + _LISTS + 1)
        for start in tl.range(begin, count, step):
            ok = offsets < count - start
            key = tl.load(key_ptr + at + start + offsets, mask=ok, other=-2)
            index = tl.load(index_ptr + at + start + offsets, mask=ok, other=0)
            tl.store(mask + index, tl.full((BLOCK,), 1, tl.uint8), mask=kept(key, index, state + _FOUND))

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
    aligned,
    block_map,
    launch,
    target,
    tl_dtype,
    upload,
    warps,
    wide_dtype,
)
from ._select_kernels import (
    bin_kernel,
    bracket_kernel,
    collect_kernel,
    count_digit_kernel,
    first_digit_kernel,
    histogram_kernel,
    pick_digit_kernel,
    sample_kernel,
)

BINS = 4096  # 12 bits a digit
SAMPLED = 1 << 24  # elements from which on a segment is sampled: a read of 64 MB costs about the 8 more launches
_RUN = 8  # neighbours read for a sample: a 32-byte sector of float32
_DEVIATIONS = 3.5


class Segment(NamedTuple):
    """The values x - base (x without a base), flat and contiguous, of which the k largest are wanted, 0 < k < n."""

    base: Tensor | None
    x: Tensor
    k: int


def bins_at_once() -> int:
    """Of a histogram: all in shared memory on NVIDIA; in registers on AMD, where half of the waves are to fit."""
    return BINS if INTERPRETING or target().backend == "cuda" else 1024


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
    start = torch.zeros(len(segments), 16, dtype=torch.int64, device="cpu")
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
        "ALIGNED": all(aligned(s.base, s.x) for s in segments), "BINS": BINS, "AT_ONCE": bins_at_once(),
        "num_warps": warps(16), "maxnreg": 64,
        "device": device,
    }  # fmt: skip
    # Comparing places in 32 bits saves registers on NVIDIA; AMD's compiler spills with them.
    narrow = INTERPRETING or target().backend == "cuda"
    collecting = {"NARROW": narrow, "BLOCK": block, **data}
    one = {"BINS": BINS, "num_warps": 8, "device": device}
    whole, each = (len(owner_host),), (len(segments),)
    # 16-bit values without a base end in at least 13 zero bits: no digit is needed there.
    digits = -(-((top if sampled else top - 12) - (13 if base is None and x.element_size() == 2 else 0)) // 12)
    if sampled:
        drawn = upload(sample_owner, torch.int32, device)
        for second in (False, True):
            launch(sample_kernel, (len(sample_owner),), table, drawn, state, counters, SECOND=second, TOP=top, RUN=_RUN,
                   BLOCK=sample_block, **data)  # fmt: skip
            launch(bracket_kernel, each, table, state, counters, int(second), 2, TOP=top, **one)
        launch(collect_kernel, whole, table, owner, state, counters, key, index, BRACKET=True, **collecting)
        launch(first_digit_kernel, each, table, state, counters, 1, 0, **one)
    launch(histogram_kernel, whole, table, owner, state, counters, TOP=top, BLOCK=block, **data)
    launch(bin_kernel, each, table, state, counters, TOP=top, **one)
    launch(collect_kernel, whole, table, owner, state, counters, key, index, BRACKET=False, **collecting)
    launch(first_digit_kernel, each, table, state, counters, 0, int(digits == 1), **one)

    def decide(passed: int, shift: int, *, is_last: bool, on_index: bool) -> None:
        launch(count_digit_kernel, whole, table, owner, state, counters, key, index, passed, shift, ON_INDEX=on_index,
               BLOCK=block, **data)  # fmt: skip
        launch(pick_digit_kernel, each, table, state, counters, passed, shift, int(is_last), int(on_index), **one)

    for i in range(1, digits):
        decide(12 * i, 0, is_last=i == digits - 1, on_index=False)
    bits_left = max(1, (max(sizes) - 1).bit_length())
    while bits_left > 0:
        decide(bits_left, max(0, bits_left - 12), is_last=False, on_index=True)
        bits_left -= 12
    return state

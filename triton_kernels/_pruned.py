"""highpass_filter's pruned form: out = x − D Eᵀ, what is removed as a product of thin matrices (story: highpass_filter.py).

Three steps: P = x E, transforms along the rows on the few removed columns; the transform of P along the other axis, the
gains and the way back; x − D Eᵀ. The second step is torch.fft for large matrices. For small ones (`turns`) it is two more
products, since few of that axis' bins are removed either: two launches for any number of matrices, and the same bits.

*Folding.* A quarter of the products suffices for a line of L = 8 K elements: with w = v + jK the angle 2πcw/L of column c is
2πcv/L + 2πcj/8, and its second part depends on c's remainder by 8 only, with opposite signs for g and 8 − g. So a transform
of length 8 across the line's parts comes first, (a, b) for each of four groups of columns (0 and 4, 1 and 7, 2 and 6, 3 and
5), and a column is a product of its group's two parts alone. That is one pass more over the data, and one more at the end;
but the models of a merge are read once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._jit import INTERPRETING, cdiv, launch, power_of_2, target, warps
from ._pruned_kernels import fold_kernel, project_kernel, subtract_kernel, turn_kernel, unfold_kernel

FOLD = 8  # parts of a line
SMALL = 1 << 20  # elements: what may come with others (fastmerge/_dispatch.py)
TURN = {"BM": 16, "BN": 32, "BK": 64}  # tiles of `turn_kernel`
PART = 256  # rows of a part, about, see `turn_kernel`
STEP = 128  # rows, see `turn_kernel`: a multiple of its tiles
TURNS = 1 << 24  # products of a panel and roots up to which they are no slower than torch.fft
GRID = 65535  # programs along a grid's second and third dimensions
_LARGE = 1 << 22  # factors of a mask, from which on its tables are large
_ENOUGH = 200  # programs of a launch, for which tiles get smaller


class Mask(Protocol):
    """fastmerge.ops._spectral_mask.SpectralMask."""

    height: int
    width: int
    bounds: Tensor
    ring: Tensor
    columns: Tensor

    def gain(self) -> Tensor: ...


class Key:
    """A mask as a dictionary key, by identity: the masks are cached objects themselves."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

    def __hash__(self) -> int:
        return id(self.mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and other.mask is self.mask


@functools.lru_cache(maxsize=64)
def mask_tables(key: Key, device: torch.device) -> tuple[Tensor, Tensor]:
    """The mask's bounds [T, H, 2] and ring [R, 2], int32, on the device: copied once, so that calls need no copy (and a
    captured graph none that would read host memory again)."""
    return key.mask.bounds.to(device), key.mask.ring.to(device)


@functools.lru_cache(maxsize=256)
def thin_axis(key: Key) -> tuple[int, int]:
    """(removed frequencies of the axis contracted first, its length)."""
    mask = key.mask
    if mask.height < mask.width:
        return len(_lines(key, True)[0]), mask.height
    return len(mask.columns), mask.width


@functools.lru_cache(maxsize=256)
def share_removed(key: Key) -> float:
    """Of all frequencies, the share that the intervals leave out (the ring is not counted)."""
    mask = key.mask
    ends = mask.bounds.clamp(max=mask.width // 2 + 1).double()
    # Of the columns below c: 0 and width / 2 count once, the others for their mirrors too.
    kept = (2 * ends - 1).clamp(min=0).clamp(max=mask.width)
    return 1.0 - float((kept[..., 1] - kept[..., 0]).clamp(min=0).sum()) / (len(ends) * mask.height * mask.width)


def _lines(key: Key, over_rows: bool) -> tuple[Tensor, Tensor]:
    """(the touched frequencies c <= L/2 of the axis contracted first, float32 [M, c]: 1 − the gain that a real result sees).

    A real result sees the mean of a bin's gain and its mirror's (-r, -c): it differs in the columns 0 and W/2 alone. Gains are
    multiples of a half, so float32 holds them. Only touched columns are looked at: a whole plane may be gigabytes.
    """
    mask, c = key.mask, key.mask.columns.long()
    height, width, tables = mask.height, mask.width, mask.bounds.shape[0]
    count = torch.zeros(height, len(c), device=c.device)
    for low, high in zip(mask.bounds[..., :1], mask.bounds[..., 1:], strict=True):
        count += (c >= low) & (c < high)
    row, column = mask.ring.long().T.contiguous()
    count.index_put_((row, torch.searchsorted(c, column)), torch.ones(len(row), device=c.device), accumulate=True)
    removed = 1 - count / tables
    mirror = (-torch.arange(height, device=c.device)) % height
    alone = (c == 0) | (2 * c == width)
    removed[:, alone] = (removed[:, alone] + removed[mirror][:, alone]) / 2
    if not over_rows:
        touched = (removed != 0).any(0)
        return c[touched], removed[:, touched]
    rows = (removed != 0).any(1)
    first = (rows | rows[mirror])[: height // 2 + 1].nonzero()[:, 0]
    whole = removed.new_zeros(width, len(first))
    whole[width - c[~alone]] = removed[mirror[first]][:, ~alone].T
    whole[c] = removed[first].T
    return first, whole


# --------------------------------------------------------------------------------------------------------- launcher


def transformed(transform: Callable[[Tensor], Tensor], x: Tensor, flags: dict[str, Any]) -> Tensor:
    """`transform` of a batch; of matrices from a table one after another, see `highpass_filter_many`."""
    if flags["table_ptr"] is None or len(x) == 1:
        return transform(x)
    return torch.cat([transform(one) for one in x.split(1)])


def products(tf32: bool) -> str:
    return "ieee" if INTERPRETING or target().backend != "cuda" else "tf32" if tf32 else "tf32x3"


def _tile(rows: int, columns: int, groups: int, several: bool) -> dict[str, int]:
    """Of a product [rows, columns]. It does not depend on the number of matrices.

    several: the kernel reads several streams, which take registers. The wide tile is what was fastest on an H100, of twelve;
    it spills on Ampere and Blackwell, and AMD has too little shared memory for it.
    """
    if INTERPRETING:
        return {"BM": 128, "BN": 128, "BK": 128}
    gpu = target()
    widest = 128 if gpu.backend == "cuda" and gpu.arch // 10 == 9 and not several else 64
    width = min(widest, max(16, power_of_2(columns)))
    while width > 32 and cdiv(rows, 64) * groups * cdiv(columns, width) < _ENOUGH:
        width //= 2
    ampere = gpu.backend == "cuda" and gpu.arch // 10 == 8 and not several
    stages, threads = (3, 4) if widest == 128 or ampere else (2, 8)
    return {"BM": 64, "BN": width, "BK": 32, "num_stages": stages, "num_warps": warps(threads)}


def _fold_tile(parts: int, rows: bool) -> dict[str, int]:
    """512 elements of every part, 4 a thread, along a line; or (rows) 32 lines, which lie side by side in memory."""
    if INTERPRETING:
        return {"BM": 64, "BK": 128}
    length = 16 if rows else min(512, power_of_2(parts))
    return {"BM": 512 // length, "BK": length, "num_warps": warps(4)}


def pruned(source, flags, out, mask, batch, _compute, add_base, tf32):  # type: ignore[no-untyped-def]
    height, width, device = mask.height, mask.width, out.device
    over_rows = height < width  # contract the shorter axis first
    m, length, *strides = (width, height, 1, width) if over_rows else (height, width, width, 1)
    several = flags["HAS_BASE"] or flags["WEIGHTED"]
    basis = _bases(Key(mask), over_rows, folds(mask, several), device)
    groups, _, n, k = basis.there.shape
    columns, size, parts = groups * n, height * width, length // FOLD
    panel = turns(mask)
    # (re, im) of a column side by side; then columns for products, rows for torch.fft
    layout = (columns, 2) if panel else (2, 2 * m)
    thin = torch.empty(batch, m * columns, dtype=torch.float32, device=device)
    bad = torch.zeros(batch, dtype=torch.int32, device=device)
    always = {"PRECISION": products(tf32), "device": device}
    inner, into, given, place = source, out, flags, strides
    if groups > 1:
        into, place = torch.empty(batch, m, length, dtype=torch.float32, device=device), (length, 1)
        inner, several = (into, (into,), (0,)), False
        given = {"HAS_BASE": False, "WEIGHTED": False, "table_ptr": None, "ALIGN": 1}
        fold: dict[str, Any] = {**_fold_tile(parts, over_rows), "device": device}
        grid = (cdiv(parts, fold["BK"]) * cdiv(m, fold["BM"]), batch)
        launch(fold_kernel, grid, *source, into, m, parts, *strides, size, **fold, **flags)
    tile = _tile(m, n, groups, several)
    launch(
        project_kernel, (groups * cdiv(n, tile["BN"]), cdiv(m, tile["BM"]), batch),
        *inner, basis.there, thin, bad, m, k, n, *place, size, *layout, **tile, **always, **given,
    )  # fmt: skip
    if panel:
        _turn(thin, _roots(Key(mask), over_rows, groups > 1, device), m, columns, batch, always)
    else:
        bins = torch.view_as_complex(thin.view(batch, columns // 2, m, 2))
        bins = transformed(lambda b: torch.fft.ifft(torch.fft.fft(b).mul_(basis.factor), norm="forward"), bins, flags)
        thin = torch.view_as_real(bins.mT.contiguous())
    tile = _tile(m, k, groups, several)
    launch(
        subtract_kernel, (groups * cdiv(k, tile["BN"]), cdiv(m, tile["BM"]), batch),
        *inner, thin, basis.back, bad, into, m, n, k, *place, size, ADD_BASE=add_base and groups == 1, **tile, **always, **given,
    )  # fmt: skip
    if groups > 1:
        launch(unfold_kernel, grid, into, source[0], bad, out, m, parts, *strides, size, flags["table_ptr"],
               ALIGN=flags["ALIGN"], MODELS=len(source[1]), ADD_BASE=add_base, **fold)  # fmt: skip


def _turn(
    thin: Tensor, tables: tuple[Tensor, Tensor, Tensor], m: int, columns: int, batch: int, meta: dict[str, Any]
) -> None:
    """The panel's transforms of length m as products, in place."""
    coarse, fine, of_bins = tables
    bins, steps = coarse.shape[1:]
    meta = meta | ({"BM": 128, "BN": 128, "BK": 128} if INTERPRETING else TURN) | {"STEP": STEP, "num_warps": warps(4)}
    parts = max(1, min(m // bins, cdiv(m, PART)))  # no more memory than `thin` has
    rows = cdiv(m, parts * STEP) * STEP
    parts, blocks = cdiv(m, rows), cdiv(columns, meta["BN"])
    low = torch.empty(batch, parts, bins, columns, dtype=torch.float32, device=thin.device)
    launch(turn_kernel, (blocks * parts, cdiv(bins, meta["BM"]), batch), thin, coarse, fine, of_bins, low, bins, m, columns,
           bins, steps, parts, rows, BACK=False, **meta)  # fmt: skip
    launch(turn_kernel, (blocks, cdiv(m, meta["BM"]), batch), low, coarse, fine, of_bins, thin, m, bins, columns,
           bins, steps, parts, rows, BACK=True, **meta)  # fmt: skip


def folds(mask: Mask, several: bool) -> bool:
    """Whether lines are folded: two passes of 8 bytes an element and less work after them (docs/gpu.md has the crossover)."""
    shorter, longer = sorted((mask.height, mask.width))
    if shorter % FOLD or shorter < 16 * FOLD:
        return False
    return several or thin_axis(Key(mask))[0] > max(32, min(96, longer // 64))


# ----------------------------------------------------------------------------------------------------------- tables


class Basis(NamedTuple):
    """What the products take, on the device."""

    there: Tensor  # float32 [groups, (high, low), N, K]: of groups of K of a line
    back: Tensor  # the same, [groups, (high, low), K, N]
    factor: Tensor  # float32 [groups · N / 2, M]: of the bins to subtract


def parts_of(x: Tensor) -> Tensor:
    """float32 [..., 2, N, K] of float64 [..., N, K]: 11 bits and the next 24, of which tensor cores take 11."""
    high = (x.float().view(torch.int32) + 4096 & -8192).view(torch.float32)
    return torch.stack([high, (x - high.double()).float()], -3)


def _bases(key: Key, over_rows: bool, folded: bool, device: torch.device) -> Basis:
    """cos and −sin along the axis contracted first, of groups of columns; held for the next matrix of this shape.

    Those of large matrices are 50 to 150 MB and take half a second to make: two are held, since models have two such shapes.
    """
    large = max(key.mask.height, key.mask.width) * thin_axis(key)[0] > _LARGE
    return (_few_bases if large else _many_bases)(key, over_rows, folded, device)


def _made_bases(key: Key, over_rows: bool, folded: bool, device: torch.device) -> Basis:
    first, removed = _lines(key, over_rows)  # [M, c]
    length = key.mask.height if over_rows else key.mask.width
    r = FOLD if folded else 1
    remainder = torch.minimum(first % r, -first % r)
    members = [(remainder % max(1, r // 2) == g).nonzero()[:, 0] for g in range(max(1, r // 2))]
    # Columns of zeros, so that groups are alike, and rows of the thin matrix start at multiples of 64 bytes.
    most = max(len(c) for c in members)
    most += -most % max(1, min(8, length // 2))
    v = torch.arange(length // r, device="cpu")
    # [group, column, (re, im), (a, b), v]
    basis = torch.zeros(len(members), most, 2, min(r, 2), len(v), dtype=torch.float64, device="cpu")
    factor = torch.zeros(len(members), most, len(removed), device="cpu")
    for g, member in enumerate(members):
        columns = first[member]
        here, there = slice(len(columns)), (columns % r)[:, None, None]
        angle = 2 * math.pi * ((columns[:, None] * v) % length).double() / length
        straight, turned = torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)
        if g == 0:  # each of its columns has one part only
            for part in range(min(r, 2)):
                basis[g, here, :, part] = straight * (there == part * (r // 2))
        else:
            basis[g, here, :, 0] = straight
            basis[g, here, :, 1] = turned * torch.where(there == g, 1.0, -1.0)
        twice = torch.where((columns == 0) | (2 * columns == length), 1.0, 2.0)  # a bin and its mirror
        factor[g, here] = (removed[:, member] * (twice.double() / (length * len(removed)))).float().T
    basis = basis.reshape(len(members), 2 * most, -1)  # [group, N, K]
    # Folding's rows are sqrt(r) and sqrt(r / 2) long: its inverse is its transpose over their squares.
    squares = torch.tensor([float(r)] + [r / 2] * (len(members) - 1), dtype=torch.float64, device="cpu")[:, None, None]
    there, back = parts_of(basis), parts_of(basis.mT * squares)
    return Basis(there.contiguous().to(device), back.contiguous().to(device), factor.flatten(0, 1).to(device))


_many_bases, _few_bases = (functools.lru_cache(maxsize=n)(_made_bases) for n in (16, 2))


def turns(mask: Mask) -> bool:
    """Whether the thin panel's transforms are products with the roots of the few bins: for small matrices.

    For them torch.fft is mostly launches, and its bits depend on how many matrices there are.
    """
    longer = max(mask.height, mask.width)
    return mask.height * mask.width <= SMALL and longer < GRID * TURN["BM"] and _turn_products(Key(mask)) <= TURNS


@functools.lru_cache(maxsize=256)
def _turn_products(key: Key) -> int:
    """Rows x bins x columns of the panel, those of a tile at least."""
    removed = _lines(key, key.mask.height < key.mask.width)[1]
    return len(removed) * int((removed != 0).any(1).sum()) * max(TURN["BN"], 2 * thin_axis(key)[0])


@functools.lru_cache(maxsize=32)
def _roots(key: Key, over_rows: bool, folded: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """cos and −sin of 2π rm/M for the R bins to remove along the axis contracted last, [2, R, M / STEP] for m that are
    multiples of STEP, [2, R, STEP] for m below it; and the factors [R, C].
    """  # fmt: skip
    factor = _bases(key, over_rows, folded, torch.device("cpu")).factor.T  # [M, C]
    m = len(factor)
    bins = (factor != 0).any(1).nonzero()[:, 0]

    def roots(of: Tensor) -> Tensor:
        angle = 2 * math.pi * ((bins[:, None] * of) % m).double() / m
        return torch.stack([angle.cos(), -angle.sin()]).float().to(device)

    scaled = factor[bins].contiguous().to(device)
    return roots(torch.arange(0, m, STEP, device=bins.device)), roots(torch.arange(STEP, device=bins.device)), scaled

"""Host side of csrc/ops/permute.cuh: which kernel moves a tensor, and with which table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _cuda
from ._permutations import Axis, collapse, require_bijection, where

TASK = np.dtype(
    [("out", "u8"), ("in", "u8"), ("base", "u8"), ("index", "u8", 4), ("size", "i8", 4), ("stride", "i8", 4),
     ("columns", "u8"), ("rows", "i8"), ("width", "i8"), ("lanes", "i8"), ("segments", "i8"), ("flags", "i8"),
     ("wb", "f4"), ("wx", "f4")]
)  # fmt: skip
CYCLES = np.dtype(
    [("x", "u8"), ("saved", "u8"), ("order", "u8"), ("bounds", "u8"), ("next", "u8"), ("n", "i8"), ("width", "i8"),
     ("segments", "i8"), ("lanes", "i8"), ("tiles", "i8")]
)  # fmt: skip
CHECK = np.dtype([("index", "u8"), ("seen", "u8"), ("wrong", "u8"), ("n", "i8")])
NARROW, WIDE, STAGED = 1, 2, 4
UNROLL = 4  # FM_UNROLL
STAGE = 32 * 1024  # bytes of source rows a block stages: three blocks fit every GPU
SEGMENT = 32  # rows of a cycle moved by one thread after another


def too_many_axes(shape: Sequence[int], perms: Mapping[int, Tensor]) -> str | None:
    """The reason a gather can not run in one launch, if any."""
    axes = collapse(shape, perms)
    if len(axes) - (bool(axes) and axes[-1].index is None) > 4:
        return f"the gather has {len(axes)} separate dimensions after merging neighbours; the kernels take 4 and a run"
    if any(a.size >= 2**31 for a in axes if a.index is not None) or math.prod(a.size for a in axes[:-1]) >= 2**31:
        return "the gather has more than 2^31 - 1 rows"
    return None


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def add_gather(
    launches: _cuda.Launches,
    out: Tensor,
    source: Tensor,
    shape: Sequence[int],
    perms: Mapping[int, Tensor],
    base: Tensor | None = None,
    weight: float = 0.0,
) -> None:
    """Adds the launch that fills `out` with `source` gathered by `perms` (merged with `base` when given).

    All tensors are contiguous and of one dtype; a copy moves words of 2 or 4 bytes.
    """
    if out.numel() == 0:
        return
    word = 4 if source.element_size() == 8 else source.element_size()
    words = source.element_size() // word
    axes = [a if a.index is None else Axis(a.size, a.index.to(out.device, torch.int32)) for a in collapse(shape, perms)]
    run = words
    if axes and axes[-1].index is None:
        run *= axes.pop().size
    aligned = all(t.data_ptr() % 16 == 0 for t in (out, source, *([] if base is None else [base])))
    columns: Tensor | None = None
    if axes and axes[-1].index is not None and not (run * word >= 512 or (run * word % 32 == 0 and aligned)):
        index = axes[-1].index
        if axes[-1].size * run * word <= _cuda.SHARED or run == 1:
            columns = (index[:, None] * run + torch.arange(run, device=index.device, dtype=torch.int32)).reshape(-1)
            axes.pop()
            run = columns.numel()
    task: Any = np.zeros((), TASK)
    task["out"], task["in"], task["base"] = out.data_ptr(), source.data_ptr(), 0 if base is None else base.data_ptr()
    task["wb"], task["wx"] = 1.0 - weight, weight
    task["size"] = 1
    rows, stride = 1, run
    for slot, axis in zip(range(3, -1, -1), reversed(axes), strict=False):
        task["size"][slot], task["stride"][slot] = axis.size, stride
        task["index"][slot] = 0 if axis.index is None else launches.keep(axis.index)
        rows, stride = rows * axis.size, stride * axis.size
    task["rows"], task["width"] = rows, run
    wide = aligned and run * word % 16 == 0
    if columns is None:
        _add_rows(launches, task, rows, run, word, wide, base)
    else:
        _add_columns(launches, task, rows, run, word, wide, base, columns)


def _add_rows(
    launches: _cuda.Launches, task: Any, rows: int, run: int, word: int, wide: bool, base: Tensor | None
) -> None:
    if base is None:
        addresses = int(task["out"]) | int(task["in"])
        access = next(b for b in (16, 8, 4, 2) if (run * word) % b == 0 and addresses % b == 0)
        kernel, packs = f"permute_rows_kernel_{access}", run * word // access
        task["width"], task["stride"] = run * word // 2, task["stride"] * word // 2  # in words of two bytes
    else:
        kernel = f"permute_merge_rows_kernel_{_cuda.NAMES[base.dtype]}" + ("" if wide else "_1")
        packs = run * word // 16 if wide else run
    lanes = min(32, _power_of_two(packs))
    segments = -(-packs // (lanes * UNROLL))
    task["lanes"], task["segments"] = lanes, segments
    launches.add(kernel, task, segments * -(-rows // (_cuda.THREADS // lanes)))


def _add_columns(
    launches: _cuda.Launches,
    task: Any,
    rows: int,
    run: int,
    word: int,
    wide: bool,
    base: Tensor | None,
    columns: Tensor,
) -> None:
    narrow, staged = run <= 65536, run * word <= _cuda.SHARED
    if narrow:
        columns = torch.where(columns >= 32768, columns - 65536, columns).to(torch.int16)
    per_block = max(1, min(rows, 64, STAGE // (run * word)))
    task["columns"] = launches.keep(columns)
    task["lanes"], task["flags"] = per_block, NARROW * narrow | WIDE * wide | STAGED * staged
    kernel = (
        f"permute_columns_kernel_{word}" if base is None else f"permute_merge_columns_kernel_{_cuda.NAMES[base.dtype]}"
    )
    launches.add(kernel, task, -(-rows // per_block), per_block * run * word if staged else 0)


def cycle_segments(perm: np.ndarray[Any, Any]) -> tuple[list[int], list[int], list[int]]:
    """(rows, bounds, next): every cycle of a permutation cut into segments of at most 32 rows.

    Segment s moves rows[bounds[s]:bounds[s + 1]]: each takes the row after it, the last one takes the first row of
    segment next[s]. Fixed points are left out.
    """
    rows: list[int] = []
    bounds, following = [0], []
    seen = np.zeros(len(perm), bool)
    for start in range(len(perm)):
        if seen[start] or perm[start] == start:
            continue
        cycle = []
        at = start
        while not seen[at]:
            seen[at] = True
            cycle.append(at)
            at = int(perm[at])
        first = len(bounds) - 1
        for begin in range(0, len(cycle), SEGMENT):
            rows += cycle[begin : begin + SEGMENT]
            bounds.append(len(rows))
            following.append(len(bounds) - 1)
        following[-1] = first
    return rows, bounds, following


def permute_rows_in_place(x: Tensor, outer: int, perm: Tensor, inner: int) -> None:
    """Gathers the middle axis of x viewed as [outer, n, inner] (inner in bytes) in place, one segment row of workspace."""
    rows, bounds, following = cycle_segments(perm.cpu().numpy())
    segments, n = len(following), perm.numel()
    if segments == 0 or x.numel() == 0:
        return
    device = x.device
    order, ends, after = (torch.tensor(v, dtype=torch.int32, device=device) for v in (rows, bounds, following))
    heads = torch.tensor([rows[b] for b in bounds[:-1]], dtype=torch.int32, device=device)
    saved = torch.empty(outer * segments * inner, dtype=torch.uint8, device=device)
    save: Any = np.zeros((), TASK)
    save["out"], save["in"], save["size"] = saved.data_ptr(), x.data_ptr(), [1, 1, outer, segments]
    save["stride"] = [0, 0, n * inner // 2, inner // 2]  # in words of two bytes, as _add_rows takes them
    first = _cuda.Launches(device)
    save["index"][3] = first.keep(heads)
    save["rows"], save["width"] = outer * segments, inner // 2
    _add_rows(first, save, outer * segments, inner // 2, 2, False, None)
    first.run()
    word = 16 if inner % 16 == 0 and x.data_ptr() % 16 == 0 else 2
    width = inner // word
    lanes = min(32, _power_of_two(width))
    tiles = -(-width // lanes)
    task: Any = np.zeros((), CYCLES)
    then = _cuda.Launches(device)
    task["x"], task["saved"] = x.data_ptr(), saved.data_ptr()
    task["order"], task["bounds"], task["next"] = then.keep(order), then.keep(ends), then.keep(after)
    task["n"], task["width"], task["segments"], task["lanes"], task["tiles"] = n, width, segments, lanes, tiles
    then.add(f"permute_cycles_kernel_{word}", task, outer * -(-segments // (_cuda.THREADS // lanes)) * tiles)
    then.run()


def permute_in_place(x: Tensor, perms: Mapping[int, Tensor]) -> None:
    """Every axis of a contiguous tensor, one after the other."""
    for axis, index in perms.items():
        outer, n = math.prod(x.shape[:axis]), index.numel()
        inner = x.numel() // max(1, outer * n) * x.element_size()
        if inner >= 512:
            permute_rows_in_place(x, outer, index, inner)
            continue
        # Short runs are staged: a block reads its rows whole before it writes them. Rows too long for that are copied.
        staged = n * inner <= _cuda.SHARED
        launches = _cuda.Launches(x.device)
        source = x if staged else x.clone()
        add_gather(launches, x, source, [outer, n * inner // x.element_size()], {1: index})
        launches.run()


def require_bijections(
    op: str, many: Sequence[Mapping[int, Tensor]], group: str, names: Sequence[str], device: torch.device
) -> None:
    """One launch for all indices of a call and one synchronisation; a bad index is then named by the reference."""
    launches = _cuda.Launches(device)
    entries = {
        id(i): (i, where(op, group, name, axis)) for p, name in zip(many, names, strict=True) for axis, i in p.items()
    }
    if not entries:
        return
    wrong = torch.zeros(len(entries), dtype=torch.int32, device=device)
    for slot, (index, _) in enumerate(entries.values()):
        if index.dtype == torch.int64 and index.numel():
            # The kernel reads int32; larger values would wrap around into range.
            index = torch.where((index < 0) | (index >= index.numel()), -1, index)
        task: Any = np.zeros((), CHECK)
        task["index"] = launches.keep(index.to(device, torch.int32).contiguous())
        task["seen"] = launches.keep(torch.zeros(-(-index.numel() // 32), dtype=torch.int32, device=device))
        task["wrong"], task["n"] = wrong.data_ptr() + 4 * slot, index.numel()
        launches.add("check_permutation_kernel", task, -(-index.numel() // _cuda.THREADS))
    launches.run()
    for (index, place), bad in zip(entries.values(), wrong.tolist(), strict=True):
        if bad:
            require_bijection(index, place)

"""Host side of csrc/ops/fw_products.cuh and fw_step.cuh, and candidates that stream from the host past a GPU's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import _cuda

BLOCK = 65536  # FM_SUM_BLOCK
TOGETHER = 12  # candidates of one launch: their partial sums leave room for three blocks on every GPU
CHUNK = 256 * BLOCK  # elements of a candidate on its way from the host

_PRODUCTS = np.dtype([("g", "u8"), ("s", "u8"), ("sums", "u8"), ("n", "i8"), ("candidates", "i8"), ("flags", "i8")])
_TOTALS = np.dtype([("sums", "u8"), ("totals", "u8"), ("blocks", "i8"), ("width", "i8")])
_STEP = np.dtype(
    [("theta", "u8"), ("s", "u8"), ("g", "u8"), ("sums", "u8"), ("n", "i8"), ("flags", "i8"), ("gamma", "f4"),
     ("unused", "i4")]
)  # fmt: skip
_NORMS, _ALIGNED = 1, 2


def _aligned(*tensors: Tensor) -> int:
    return _ALIGNED if all(t.data_ptr() % 16 == 0 for t in tensors) else 0


def add_totals(launches: _cuda.Launches, sums: Tensor, totals: Tensor) -> None:
    """Adds block sums [blocks, width] to float64 totals [width], in index order."""
    task: Any = np.zeros((), _TOTALS)
    task["sums"], task["totals"] = launches.keep(sums), launches.keep(totals)
    task["blocks"], task["width"] = sums.shape
    launches.add("fw_totals_kernel", task, 1)


def products(
    gradients: Sequence[Tensor], candidates: Sequence[Sequence[Tensor]], norms: bool, totals: Tensor
) -> Tensor:
    """Adds the products of L tensors to `totals` [L, 2K + 1] (dots, squares, |g|²) on the device, and returns it."""
    launches = _cuda.Launches(gradients[0].device)
    count = len(candidates)
    parts: list[tuple[int, list[int], Tensor]] = []  # (tensor, its candidates, their totals)
    for n, gradient in enumerate(gradients):
        if gradient.numel() == 0:
            continue
        # Candidates of one dtype share a launch. A gradient below float32 meets only candidates of its own dtype there.
        groups: dict[torch.dtype, list[int]] = {}
        for k in range(count):
            groups.setdefault(candidates[k][n].dtype, []).append(k)
        for dtype, members in groups.items():
            g = (gradient if gradient.dtype in (torch.float32, dtype) else gradient.float()).contiguous()
            for begin in range(0, len(members), TOGETHER):
                chosen = members[begin : begin + TOGETHER]
                parts.append((n, chosen, _add_products(launches, g, [candidates[k][n] for k in chosen], norms)))
                start = [totals[n, k] for k in chosen] + [totals[n, count + k] for k in chosen] + [totals[n, 2 * count]]
                parts[-1][2].copy_(torch.stack(start))
    launches.run()
    for n, chosen, sums in parts:
        at = torch.tensor(chosen, device=totals.device)
        totals[n, at] = sums[: len(chosen)]
        if norms:
            totals[n, count + at] = sums[len(chosen) : -1]
        totals[n, 2 * count] = sums[-1]
    return totals


def _add_products(launches: _cuda.Launches, g: Tensor, pool: Sequence[Tensor], norms: bool) -> Tensor:
    """Adds the launches for one tensor and up to TOGETHER candidates of one dtype; returns where the totals will be."""
    k, blocks = len(pool), -(-g.numel() // BLOCK)
    dense = [s.contiguous() for s in pool]
    addresses = _cuda.upload(np.array([launches.keep(s) for s in dense], np.uint64), g.device)
    sums = torch.empty(blocks, 2 * k + 1, dtype=torch.float32, device=g.device)
    task: Any = np.zeros((), _PRODUCTS)
    task["g"], task["s"], task["sums"] = launches.keep(g), launches.keep(addresses), sums.data_ptr()
    task["n"], task["candidates"] = g.numel(), k
    task["flags"] = _NORMS * norms | _aligned(g, *dense)
    kernel = f"fw_products_kernel_{_cuda.NAMES[g.dtype]}_{_cuda.NAMES[dense[0].dtype]}"
    launches.add(kernel, task, blocks, (2 * k + 1) * _cuda.THREADS * 4)
    totals = torch.empty(2 * k + 1, dtype=torch.float64, device=g.device)
    add_totals(launches, sums, totals)
    return totals


def step(
    thetas: Sequence[Tensor],
    ends: Sequence[Tensor | None],
    gammas: Sequence[float],
    slopes: Sequence[Tensor | None],
) -> Tensor:
    """One launch per pair of dtypes for all tensors; returns the products [L, 2] (zeros where there is no slope)."""
    device = thetas[0].device
    launches = _cuda.Launches(device)
    totals = torch.zeros(len(thetas), 2, dtype=torch.float64, device=device)
    waiting = []
    for n, (theta, s, gamma, g) in enumerate(zip(thetas, ends, gammas, slopes, strict=True)):
        task: Any = np.zeros((), _STEP)
        task["theta"], task["n"], task["gamma"] = launches.keep(theta), theta.numel(), gamma
        task["s"] = 0 if s is None else launches.keep(s)
        task["flags"] = _aligned(theta, *(t for t in (s, g) if t is not None))
        pair = f"{_cuda.NAMES[theta.dtype]}_{_cuda.NAMES[theta.dtype if s is None else s.dtype]}"
        if g is None:
            launches.add(f"fw_step_kernel_{pair}", task, -(-theta.numel() // (_cuda.THREADS * 16)))
            continue
        sums = torch.empty(-(-theta.numel() // BLOCK), 2, dtype=torch.float32, device=device)
        task["g"], task["sums"] = launches.keep(g), sums.data_ptr()
        launches.add(f"fw_step_products_kernel_{pair}", task, len(sums), 2 * _cuda.THREADS * 4)
        waiting.append((n, sums))
    for n, sums in waiting:  # after the kernels that write the sums
        add_totals(launches, sums, totals[n])
    launches.run()
    return totals


class Transfers(Protocol):
    """Two device buffers filled from the host beside the computation; slots are 0 and 1."""

    def send(self, slot: int, piece: Tensor) -> Tensor:
        """Queues the copy of a host piece into a slot's buffer, after the slot's last use, and returns the device piece."""

    def ready(self, slot: int) -> None:
        """Makes the computation wait for the slot's copy."""

    def used(self, slot: int) -> None:
        """Marks the slot free once the computation queued so far is done."""


class PinnedTransfers:
    """A copy stream, a pinned and a device buffer per slot: bounded memory however many candidates pass."""

    def __init__(self, device: torch.device, elements: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pinned = [torch.empty(elements * 4, dtype=torch.uint8, pin_memory=True, device="cpu") for _ in range(2)]
        self.buffers = [torch.empty(elements * 4, dtype=torch.uint8, device=device) for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in range(2)]
        self.free = [torch.cuda.Event() for _ in range(2)]

    def send(self, slot: int, piece: Tensor) -> Tensor:
        size = piece.numel() * piece.element_size()
        self.copied[slot].synchronize()  # the host must not overwrite a pinned buffer that is still being read
        self.pinned[slot][:size].view(piece.dtype).copy_(piece)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.free[slot])
            self.buffers[slot][:size].copy_(self.pinned[slot][:size], non_blocking=True)
            self.copied[slot].record(self.stream)
        return self.buffers[slot][:size].view(piece.dtype)

    def ready(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.copied[slot])

    def used(self, slot: int) -> None:
        self.free[slot].record(torch.cuda.current_stream(self.device))


def streamed_products(
    gradients: Sequence[Tensor],
    candidates: Sequence[Sequence[Tensor]],
    norms: bool,
    totals: Tensor,
    *,
    transfers: Callable[[torch.device, int], Transfers] = PinnedTransfers,
    chunk: int = CHUNK,
) -> Tensor:
    """:func:`products` with candidates on the host: pieces of one candidate after another pass through two buffers.

    Each piece meets its gradient alone, so device memory does not grow with K; sums are the same bits as all at once,
    because pieces are whole sum blocks and totals continue in index order.
    """
    longest = max(g.numel() for g in gradients)
    lanes = transfers(gradients[0].device, min(chunk, max(longest, 1)))
    count = len(candidates)
    queue = [
        (n, k, begin) for n, g in enumerate(gradients) for k in range(count) for begin in range(0, g.numel(), chunk)
    ]
    sent: dict[int, Tensor] = {}

    def send(i: int) -> None:
        n, k, begin = queue[i]
        sent[i] = lanes.send(i % 2, candidates[k][n].reshape(-1)[begin : begin + chunk])

    if queue:
        send(0)
    for i, (n, k, begin) in enumerate(queue):
        if i + 1 < len(queue):
            send(i + 1)
        lanes.ready(i % 2)
        g = gradients[n].reshape(-1)[begin : begin + chunk]
        row = torch.stack([totals[n, k], totals[n, count + k], totals[n, 2 * count]]).reshape(1, 3)
        products([g], [[sent.pop(i)]], norms, row)
        totals[n, k], totals[n, count + k] = row[0, 0], row[0, 1]
        if k == count - 1:
            totals[n, 2 * count] = row[0, 2]
        lanes.used(i % 2)
    return totals

"""Host side of csrc/ops/fw_products.cuh and fw_step.cuh, and candidates that stream from the host past a GPU's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import _cuda

BLOCK = 65536  # elements whose sum is a float32
TOGETHER = 12  # FM_TOGETHER, candidates of one launch: their partial sums leave room for three blocks on every GPU
CHUNK = 256 * BLOCK  # elements of a candidate on its way from the host
PART = 16 * _cuda.THREADS  # elements of a sum block that a CUDA block owns: FM_ELEMENTS a thread

_PRODUCTS = np.dtype(
    [("g", "u8"), ("sums", "u8"), ("s", "u8", TOGETHER), ("n", "i8"), ("candidates", "i8"), ("flags", "i8")]
)
_TOTALS = np.dtype([("sums", "u8"), ("at", "u8", 2 * TOGETHER + 1), ("parts", "i8"), ("of_block", "i8")])
_STEP = np.dtype(
    [("theta", "u8"), ("s", "u8"), ("g", "u8"), ("sums", "u8"), ("n", "i8"), ("flags", "i8"), ("gamma", "f4"),
     ("unused", "i4")]
)  # fmt: skip
_NORMS, _ALIGNED = 1, 2


def _aligned(*tensors: Tensor) -> int:
    return _ALIGNED if all(t.data_ptr() % 16 == 0 for t in tensors) else 0


class Sums:
    """Sums that launches write, [columns, parts], and the float64 totals that they are added to after them."""

    def __init__(self, launches: _cuda.Launches) -> None:
        self.launches = launches
        self.waiting: list[tuple[Any, int]] = []

    def make(self, n: int, at: Sequence[int]) -> int:
        """The address of the sums of n elements; `at` has the address of each column's total, 0 where none is wanted."""
        parts = -(-n // PART)
        sums = torch.empty(len(at), parts, dtype=torch.float32, device=self.launches.device)
        task: Any = np.zeros((), _TOTALS)
        task["sums"], task["parts"], task["of_block"] = self.launches.keep(sums), parts, BLOCK // PART
        task["at"][: len(at)] = at
        self.waiting.append((task, len(at)))
        return sums.data_ptr()

    def run(self) -> None:
        """Queues all launches: the totals after every kernel that writes sums."""
        for task, columns in self.waiting:
            self.launches.add("fw_totals_kernel", task, columns)
        self.launches.run()


def products(
    gradients: Sequence[Tensor], candidates: Sequence[Sequence[Tensor]], norms: bool, totals: Tensor
) -> Tensor:
    """Adds the products of L tensors to `totals` [L, 2K + 1] (dots, squares, |g|²) on the device, and returns it."""
    sums = Sums(_cuda.Launches(totals.device))
    count = len(candidates)
    for n, gradient in enumerate(gradients):
        # Candidates of one dtype share a launch.
        groups: dict[torch.dtype, list[int]] = {}
        for k in range(count):
            groups.setdefault(candidates[k][n].dtype, []).append(k)
        for members in groups.values():
            for begin in range(0, len(members), TOGETHER):
                chosen = members[begin : begin + TOGETHER]
                at = _totals_of(totals[n], chosen, norms)
                _add_products(sums, gradient, [candidates[k][n] for k in chosen], norms, at)
    sums.run()
    return totals


def _totals_of(row: Tensor, chosen: Sequence[int], norms: bool) -> list[int]:
    """Where the totals of some candidates are in a tensor's row; |g|² goes with the last candidate, once."""
    count = len(row) // 2
    columns = [*chosen, *((count + k if norms else -1) for k in chosen), 2 * count if count - 1 in chosen else -1]
    return [0 if c < 0 else row.data_ptr() + c * row.stride(0) * row.element_size() for c in columns]


def _add_products(sums: Sums, gradient: Tensor, pool: Sequence[Tensor], norms: bool, at: Sequence[int]) -> None:
    """Adds the launch for one tensor and up to TOGETHER candidates of one dtype; their totals are at the addresses `at`."""
    if gradient.numel() == 0:
        return
    dtype, launches = pool[0].dtype, sums.launches
    # A gradient below float32 meets only candidates of its own dtype there.
    g = (gradient if gradient.dtype in (torch.float32, dtype) else gradient.float()).contiguous()
    dense = [s.contiguous() for s in pool]
    task: Any = np.zeros((), _PRODUCTS)
    task["g"], task["sums"] = launches.keep(g), sums.make(g.numel(), at)
    task["s"][: len(dense)] = [launches.keep(s) for s in dense]
    task["n"], task["candidates"] = g.numel(), len(dense)
    task["flags"] = _NORMS * norms | _aligned(g, *dense)
    kernel = f"fw_products_kernel_{_cuda.NAMES[g.dtype]}_{_cuda.NAMES[dtype]}"
    launches.add(kernel, task, -(-g.numel() // PART), len(at) * _cuda.THREADS * 4)


def step(
    thetas: Sequence[Tensor],
    ends: Sequence[Tensor | None],
    gammas: Sequence[float],
    slopes: Sequence[Tensor | None],
) -> Tensor:
    """One launch per pair of dtypes for all tensors; returns the products [L, 2] (zeros where there is no slope)."""
    device = thetas[0].device
    sums = Sums(launches := _cuda.Launches(device))
    totals = torch.zeros(len(thetas), 2, dtype=torch.float64, device=device)
    for n, (theta, s, gamma, g) in enumerate(zip(thetas, ends, gammas, slopes, strict=True)):
        if theta.numel() == 0:
            continue
        task: Any = np.zeros((), _STEP)
        task["theta"], task["n"], task["gamma"] = launches.keep(theta), theta.numel(), gamma
        task["s"] = 0 if s is None else launches.keep(s)
        task["flags"] = _aligned(theta, *(t for t in (s, g) if t is not None))
        pair = f"{_cuda.NAMES[theta.dtype]}_{_cuda.NAMES[theta.dtype if s is None else s.dtype]}"
        blocks = -(-theta.numel() // PART)
        if g is None:
            launches.add(f"fw_step_kernel_{pair}", task, blocks)
            continue
        place = totals.data_ptr() + n * 16
        task["g"], task["sums"] = launches.keep(g), sums.make(theta.numel(), (place, place + 8))
        launches.add(f"fw_step_products_kernel_{pair}", task, blocks, 2 * _cuda.THREADS * 4)
    sums.run()
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
        sums = Sums(_cuda.Launches(totals.device))
        _add_products(sums, g, [sent.pop(i)], norms, _totals_of(totals[n], [k], norms))
        sums.run()
        lanes.used(i % 2)
    return totals

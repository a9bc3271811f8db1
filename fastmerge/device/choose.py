"""--device: which devices a name means, and whether `auto` takes the GPU.

The model behind `auto` counts bytes. On either side every input is read from its file, READ bytes a second and worker.
The CPU then merges them at `rate` bytes a second and worker; a GPU has them copied in and the result copied back, both
directions at once, at the bus's measured speed, and its kernels are faster than any bus. Starting CUDA and loading the
kernels takes STARTUP seconds. Passes that look at the inputs before the merge run on the CPU either way and cancel out.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BadInput
from ..methods import Method
from . import cuda
from .protocol import Device

READ = 7e9  # bytes/s and worker from a warm page cache: taken, a little below what warm reads gave on two machines
# Bytes/s and worker, measured on AMD EPYC (docs/performance.md): merging a base and four bfloat16 models by a fused
# element-wise rule, by random masks, by ranks, and through the high-pass filter.
RATE = 5e9
RATES = {"dare_linear": 2.1e9, "dare_ties": 2.1e9, "della": 0.4e9, "della_linear": 0.4e9, "fr": 1.75e9, "free": 1.75e9}
BUS = 64e9  # bytes/s of the fastest bus in common use: what a job must beat before the real one is measured
STARTUP = 3.0  # s
NAMES = "auto, cpu, cuda, cuda:0 or cuda:all"

_devices: contextvars.ContextVar[Sequence[Device] | None] = contextvars.ContextVar("fastmerge_devices", default=None)


@contextlib.contextmanager
def use_devices(devices: Sequence[Device]) -> Iterator[None]:
    """Within the block `cuda:i` means devices[i], whatever the machine has."""
    token = _devices.set(devices)
    try:
        yield
    finally:
        _devices.reset(token)


def _available() -> tuple[Sequence[Device], str | None]:
    """The GPUs, and why there is none."""
    given = _devices.get()
    if given is not None:
        return given, None if given else "there is none"
    reason = cuda.why_none()
    return (cuda.devices(), None) if reason is None else ((), reason)


@dataclass(frozen=True)
class Work:
    """What a job asks of a device, from headers."""

    method: Method
    bytes_in: int  # of the inputs of all merged tensors
    bytes_out: int
    workers: int


@dataclass(frozen=True)
class Choice:
    """The devices that merge (none: the CPU), why, and the numbers behind it."""

    devices: Sequence[Device] = ()
    why: str = ""
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(d.name for d in self.devices) or "cpu"

    def where(self, method: Method) -> dict[str, str]:
        """Which pass runs where."""
        passes = {"fit": method.fit_pass, "scan": method.scan_pass}
        return {**{name: "cpu" for name, has in passes.items() if has is not None}, "merge": self.name}


def parse(text: str) -> str | int:
    """ "auto", "cpu", "all" or a device's index. Raises BadInput."""
    if text in ("auto", "cpu"):
        return text
    found = re.fullmatch(r"cuda(?::(\d+|all))?", text)
    if found is None:
        raise BadInput(f"device {text!r} is not one of {NAMES}", remedy="see `fastmerge doctor` for what is there")
    return 0 if found[1] is None else "all" if found[1] == "all" else int(found[1])


def why_cpu(method: Method) -> str | None:
    """None when a GPU can merge by `method`, else why not."""
    if method.grain == "tensor":
        return f"{method.name} takes whole tensors, and only chunks are merged on a GPU"
    return None


def choose(device: str, work: Work) -> Choice:
    """The devices that `device` stands for. Raises BadInput where one is asked for by name and can not serve."""
    wanted = parse(device)
    if wanted == "cpu":
        return Choice()
    if wanted == "auto":
        return _automatic(work)
    found, reason = _available()
    if reason is not None:
        raise BadInput(f"device {device!r} can not be used: {reason}", remedy="see `fastmerge doctor`, or --device cpu")
    if isinstance(wanted, int) and wanted >= len(found):
        have = ", ".join(d.name for d in found)
        raise BadInput(
            f"device {device!r} is not there: this machine has {len(found)} ({have})",
            remedy="one of these, cuda:all, or cpu",
        )
    reason = why_cpu(work.method)
    if reason is not None:
        raise BadInput(f"device {device!r}: {reason}", remedy="--device cpu or auto")
    chosen = list(found) if wanted == "all" else [found[int(wanted)]]
    return Choice(chosen, f"asked for by --device {device}", seconds(work, len(chosen), chosen[0].bandwidth()))


def seconds(work: Work, devices: int, bus: float) -> dict[str, Any]:
    """The model's terms and totals, in bytes, bytes/s and seconds."""
    rate = RATES.get(work.method.name, RATE)
    read = work.bytes_in / (READ * work.workers)
    copy = max(work.bytes_in, work.bytes_out) / (bus * devices)
    return {
        "bytes_up": work.bytes_in,
        "bytes_down": work.bytes_out,
        "bus_bytes_per_s": bus,
        "read_bytes_per_s": READ * work.workers,
        "cpu_bytes_per_s": rate * work.workers,
        "startup_s": STARTUP,
        "read_s": read,
        "copy_s": copy,
        "cpu_s": read + work.bytes_in / (rate * work.workers),
        "gpu_s": STARTUP + max(read, copy),
    }


def _automatic(work: Work) -> Choice:
    found, reason = _available()
    if reason is not None:
        return Choice(why=f"no GPU: {reason}")
    reason = why_cpu(work.method)
    if reason is not None:
        return Choice(why=reason)
    model = seconds(work, 1, BUS)
    if model["gpu_s"] < model["cpu_s"]:  # worth waking the device for its real speed
        model = seconds(work, 1, found[0].bandwidth())
    if model["gpu_s"] < model["cpu_s"]:
        return Choice([found[0]], f"auto: {found[0].name}. {_said(model)}", model)
    terms = {"the bus": "copy_s", "starting CUDA": "startup_s", "reading the files": "read_s"}
    bound = max(terms, key=lambda t: model[terms[t]])
    return Choice((), f"auto: the CPU; on a GPU the job is bound by {bound}. {_said(model)}", model)


def _said(m: dict[str, Any]) -> str:
    return (
        f"Model: {m['bytes_up'] / 1e9:.2f} GB to the GPU and {m['bytes_down'] / 1e9:.2f} GB back at "
        f"{m['bus_bytes_per_s'] / 1e9:.0f} GB/s, {m['startup_s']:.0f} s to start, in all {m['gpu_s']:.1f} s; "
        f"the CPU at {m['cpu_bytes_per_s'] / 1e9:.1f} GB/s after reading at {m['read_bytes_per_s'] / 1e9:.0f}: "
        f"{m['cpu_s']:.1f} s"
    )

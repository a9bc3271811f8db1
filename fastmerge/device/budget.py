"""How large a chunk and how many buffers fit: bytes of device memory and of pinned memory, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BadInput
from ..io.pipeline import BLOCK

CHUNK = 64 * BLOCK  # elements; a 16-bit chunk is 8 MiB, enough for a copy at full speed
ALIGN = 256  # bytes that an input of a slot may take beyond its elements
SHARE = 0.8  # of the free device memory, without --max-vram: the rest is for fragments and others


@dataclass(frozen=True)
class Budget:
    """What a stage allocates: `slots` times (`input_bytes` + `output_bytes`), on the host as on the device."""

    chunk: int  # elements
    slots: int
    input_bytes: int  # of one slot, all inputs
    output_bytes: int
    workspace: int  # bytes an operator's temporaries may take on the device while a chunk is merged
    limit: int  # bytes of device memory in all

    @property
    def slot_bytes(self) -> int:
        return self.input_bytes + self.output_bytes

    @property
    def pinned_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def device_bytes(self) -> int:
        return self.slots * self.slot_bytes + self.workspace

    @property
    def collect_bytes(self) -> int:
        """Left for whole tensors."""
        return self.limit - self.device_bytes


def _of(chunk: int, slots: int, inputs: int, per_element: int, out: int, compute: int, limit: int) -> Budget:
    return Budget(
        chunk=chunk,
        slots=slots,
        input_bytes=per_element * chunk + inputs * ALIGN,
        output_bytes=-(-out * chunk // ALIGN) * ALIGN,
        # an operator without a fused kernel holds every delta, a sum, a mask and a divisor
        workspace=(inputs + 3) * compute * chunk,
        limit=limit,
    )


def make_budget(
    name: str,
    *,
    inputs: int,
    per_element: int,
    out: int,
    compute: int,
    largest: int,
    workers: int,
    max_vram: int | None,
    free: int,
    max_pinned: int | None = None,
) -> Budget:
    """The largest chunks, then the most slots (at most workers + 2, at least 2), that fit device `name`.

    Args:
        inputs: tensors read per element (base and models). per_element: their bytes, the widest tensor of the job's.
        out, compute: bytes of a result and of the arithmetic. largest: elements of the largest tensor.
        max_vram: the user's bound; default 80 % of `free`, the device's free bytes. max_pinned: bytes of host buffers.

    Raises: BadInput with the least number of bytes when not even two slots of BLOCK elements fit.
    """
    limit = int(free * SHARE) if max_vram is None else max_vram
    biggest = max(BLOCK, min(CHUNK, -(-largest // BLOCK) * BLOCK))
    least = _of(BLOCK, 2, inputs, per_element, out, compute, limit)
    if least.device_bytes > limit:
        said = f"--max-vram {limit}" if max_vram is not None else f"{name} has {free} bytes free, of which {limit},"
        raise BadInput(
            f"{said} is too small: {name} needs {least.device_bytes} bytes for this recipe",
            remedy=f"--max-vram {least.device_bytes} or more" if max_vram is not None else "--device cpu",
        )
    if max_pinned is not None and least.pinned_bytes > max_pinned:
        raise BadInput(
            f"--max-memory leaves {max(max_pinned, 0)} bytes for pinned buffers, {name} needs {least.pinned_bytes}",
            remedy="allow more memory, use fewer threads, or --device cpu",
        )
    chunk = biggest
    while chunk >= BLOCK:
        for slots in (workers + 2, 2):
            found = _of(chunk, slots, inputs, per_element, out, compute, limit)
            if found.device_bytes <= limit and (max_pinned is None or found.pinned_bytes <= max_pinned):
                return found
        chunk = chunk // 2 // BLOCK * BLOCK
    return least

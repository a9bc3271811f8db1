"""Theoretical occupancy of an NVIDIA kernel from compile-time numbers (CUDA's occupancy rules; no GPU involved)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one streaming multiprocessor (CUDA programming guide, table of technical specifications)."""

    warps: int
    blocks: int
    shared: int  # bytes for all blocks
    shared_per_block: int  # bytes a block may ask for
    registers: int = 65536


SM = {
    80: Multiprocessor(64, 32, 164 * 1024, 163 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024, 227 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024, 227 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024, 99 * 1024),
}
RESERVED = 1024  # shared memory the system takes for each block


def occupancy(arch: int, registers: int, shared: int, threads: int) -> float:
    """Resident warps over the maximum; 0 when a block does not fit at all."""
    sm = SM[arch]
    warps = -(-threads // 32)
    if shared > sm.shared_per_block:
        return 0.0
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        sm.warps // warps,
        sm.blocks,
        (sm.registers // per_warp) // warps,
        sm.shared // (-(-(shared + RESERVED) // 128) * 128),
    )
    return blocks * warps / sm.warps

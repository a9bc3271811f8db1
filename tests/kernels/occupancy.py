"""Theoretical occupancy from compile-time numbers: the vendors' rules, no GPU involved."""

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
CDNA3 = 64 * 1024  # shared memory of a gfx942 multiprocessor, and the most a block may ask for
RESERVED = 1024  # shared memory the system takes for each block


def occupancy(arch: int, registers: int, shared: int, threads: int) -> float:
    """Of an NVIDIA kernel: resident warps over the maximum; 0 when a block does not fit at all."""
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


def occupancy_gfx942(registers: int, shared: int, waves: int) -> float:
    """Of `waves` of 64 threads a block: four SIMDs of at most 8 waves, 512 registers a lane, given out by 8."""
    if shared > CDNA3:
        return 0.0
    by_registers = 4 * min(8, 512 // (-(-registers // 8) * 8)) // waves
    return min(by_registers, CDNA3 // shared if shared else 32) * waves / 32

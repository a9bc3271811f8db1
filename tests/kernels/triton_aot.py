"""Compiles every Triton kernel for real GPUs on a machine without one, and reads what the compiler gave.

The launchers themselves run, on small CPU tensors, under a driver that claims a GPU: so what is compiled is what would
be launched, with the same specialisations and options. Each row says registers, spills, shared memory, 128-bit loads
and stores, and theoretical occupancy. The committed table is triton_resources.json:

    python tests/kernels/triton_aot.py            # check against it: exit code 1 where a kernel got worse
    python tests/kernels/triton_aot.py --write    # replace it, after reading the difference
    python tests/kernels/triton_aot.py --out F    # only write the present table to F
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE / "triton_resources.json"
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
           "sm_120": ("cuda", 120, 32), "gfx942": ("hip", "gfx942", 64)}  # fmt: skip
MEMORY = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?((?:LDG|STG|LDL|STL)[A-Z0-9_.]*)", re.M)


class Driver:
    """What Triton asks of a driver while compiling. Nothing can be launched through it."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.binary_ext = "cubin" if target.backend == "cuda" else "hsaco"

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return [t[1] for t in TARGETS.values()].index(self.target.arch)  # Triton keeps one backend per device number

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Within the block every launch compiles for `target` instead; yields (kernel name, compiled kernel) pairs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(Driver(GPUTarget(*TARGETS[target])))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = None


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def machine_code(cubin: bytes) -> bytes:
    """The instructions of the one kernel of an ELF file."""
    table, size, count, names = struct.unpack_from("<Q", cubin, 40) + struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = sections[names][4]
    found = [cubin[s[4] : s[4] + s[5]] for s in sections if cubin.startswith(b".text.", names + s[0])]
    assert len(found) == 1, f"{len(found)} kernels in a file"
    return found[0]


def disassembled(cubins: list[bytes], arch: int) -> list[str]:
    """The assembly of every kernel, by one process: starting it takes longer than its work."""
    codes = [machine_code(c) for c in cubins]
    ends = list(itertools.accumulate(map(len, codes)))
    with tempfile.NamedTemporaryFile(suffix=".bin") as f:
        f.write(b"".join(codes))
        f.flush()
        command = [_tool("nvdisasm"), "-ndf", "-b", f"SM{arch}" + "a" * (arch >= 90), f.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines: list[list[str]] = [[] for _ in codes]
    which = 0
    for line in done.stdout.splitlines():
        if found := re.match(r"\s+/\*([0-9a-f]{4,})\*/", line):
            at = int(found[1], 16)
            while at >= ends[which]:
                which += 1
            lines[which].append(line)
    assert at == ends[-1] - 16, "nvdisasm did not print all instructions"
    return ["\n".join(held) for held in lines]


def nvidia_row(kernel: Any, sass: str, arch: int) -> dict[str, Any]:
    from kernels.occupancy import occupancy

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", f.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found, f"cuobjdump printed no resource usage: {usage.stdout}{usage.stderr}"
    memory = MEMORY.findall(sass)
    assert memory, "nvdisasm printed no memory instruction"
    registers, shared = int(found[1]), int(kernel.metadata.shared)
    return {
        "registers": registers,
        "spills": sum(i.startswith(("LDL", "STL")) for i in memory) + int(found[4]),
        "shared": shared,
        "wide_loads": sum(i.startswith("LDG") and ".128" in i for i in memory),
        "wide_stores": sum(i.startswith("STG") and ".128" in i for i in memory),
        "half_loads": sum(i.startswith("LDG") and ".64" in i for i in memory),
        "fma": len(re.findall(r"\b[FD]FMA", sass)),
        "occupancy": round(occupancy(arch, registers, shared, kernel.metadata.num_warps * 32), 3),
    }


def amd_row(kernel: Any) -> dict[str, Any]:
    from kernels.occupancy import occupancy_gfx942

    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, f"no {name} in the AMD assembly"
        return int(found[1])

    registers, shared = number("vgpr_count"), int(kernel.metadata.shared)  # which the launch asks for, not the code
    return {
        "registers": registers,
        "spills": number("vgpr_spill_count"),  # scalar registers spill to vector lanes, not to memory
        "shared": shared,
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
        "half_loads": len(re.findall(r"(?:global|buffer)_load_dwordx2", text)),
        "occupancy": round(occupancy_gfx942(registers, shared, kernel.metadata.num_warps), 3),
    }


def rows(target: str) -> dict[str, dict[str, Any]]:
    """The table's rows of one target: {scenario / kernel: resources}."""
    from kernels.triton_scenarios import SCENARIOS

    backend, arch, _ = TARGETS[target]
    found: dict[str, Any] = {}
    with compiling(target) as compiled:
        for scenario, launch in SCENARIOS.items():
            launch()
            variants: dict[str, list[str]] = {}
            for name, kernel in compiled:
                known = variants.setdefault(name, [])
                if kernel.hash not in known:
                    known.append(kernel.hash)
                    found[f"{scenario} / {name}" + (f" {len(known)}" if len(known) > 1 else "")] = kernel
            compiled.clear()
    kernels = {k.hash: k for k in found.values()}  # scenarios share some
    if backend == "cuda":
        sass = disassembled([k.asm["cubin"] for k in kernels.values()], arch)
        read = {h: nvidia_row(k, text, arch) for (h, k), text in zip(kernels.items(), sass, strict=True)}
    else:
        read = {h: amd_row(k) for h, k in kernels.items()}
    return {name: read[k.hash] for name, k in found.items()}


def worse(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """In which respects a row is worse than the committed one."""
    grows = [k for k in ("registers", "spills", "shared") if new[k] > old[k]]
    shrinks = [k for k in ("wide_loads", "wide_stores", "occupancy") if new[k] < old[k]]
    return [f"{k} {old[k]} -> {new[k]}" for k in grows + shrinks]


def compare(table: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    bad = []
    for target in TARGETS:
        if set(table[target]) != set(committed[target]):
            bad.append(f"{target}: the kernels are not those of the committed table: write it anew")
            continue
        for name, row in table[target].items():
            if reasons := worse(row, committed[target][name]):
                bad.append(f"{target} {name}: {', '.join(reasons)}")
    return bad


def main(argv: list[str]) -> int:
    # Two at a time; forked before anything heavy is imported.
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        table: dict[str, Any] = dict(zip(TARGETS, pool.map(rows, TARGETS), strict=True))
    import triton

    table["triton"] = triton.__version__
    if "--write" in argv:
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        return 0
    if "--out" in argv:
        Path(argv[argv.index("--out") + 1]).write_text(json.dumps(table))
        return 0
    bad = compare(table, json.loads(TABLE.read_text()))
    print("\n".join(bad) or "no kernel got worse")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        os.environ.pop("TRITON_INTERPRET", None)
        sys.exit(main(sys.argv[1:]))

"""Compiles every CUDA kernel with NVRTC for real GPUs on a machine without one, and reads what the compiler gave.

The sources and options are those that fastmerge/_cupy.py gives NVRTC on a user's machine. Each row says registers,
spills, static and dynamic shared memory, 128-bit loads and stores, and theoretical occupancy at that shared memory. The
committed table is cuda_resources.json:

    python tests/kernels/cuda_nvrtc.py            # check against it: exit code 1 where a kernel got worse
    python tests/kernels/cuda_nvrtc.py --write    # replace it, after reading the difference
    python tests/kernels/cuda_nvrtc.py --out F    # only write the present table to F
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent)]

from kernels.occupancy import RESERVED, occupancy  # noqa: E402
from kernels.triton_aot import _tool  # noqa: E402

from fastmerge import _cuda, _cupy  # noqa: E402
from fastmerge.ops._fw_cuda import TOGETHER  # noqa: E402
from fastmerge.ops._permute_cuda import STAGE  # noqa: E402

TABLE = Path(__file__).parent / "cuda_resources.json"
TARGETS = (80, 90, 100, 120)
# Global, local and generic accesses.
MEMORY = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?((?:LDG|STG|LDL|STL|LD|ST)\b[A-Z0-9_.]*)", re.M)


@functools.cache
def nvrtc() -> Any:
    """cuda-bindings' NVRTC module; the libraries are those of the nvidia-cuda-nvrtc wheel, wherever it is installed."""
    files = importlib.metadata.distribution("nvidia-cuda-nvrtc").files or []
    for f in sorted(str(p) for p in files if re.search(r"libnvrtc(-builtins)?\.so", p.name) and "alt" not in p.name):
        ctypes.CDLL(str(importlib.metadata.distribution("nvidia-cuda-nvrtc").locate_file(f)), ctypes.RTLD_GLOBAL)
    from cuda.bindings import nvrtc

    return nvrtc


def compile_source(name: str, arch: int, source: str | None = None) -> bytes:
    """The cubin of csrc/ops/<name>.cuh for sm_<arch>; raises with NVRTC's log when it does not compile."""
    n = nvrtc()
    status, program = n.nvrtcCreateProgram(
        (source or _cupy.source(name)).encode(), f"{name}.cu".encode(), 0, None, None
    )
    assert status == 0, status
    options = [o.encode() for o in (*_cupy.OPTIONS, f"--gpu-architecture=sm_{arch}")]
    (status,) = n.nvrtcCompileProgram(program, len(options), options)
    if status != 0:
        _, size = n.nvrtcGetProgramLogSize(program)
        log = b" " * size
        n.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} for sm_{arch}: {log.decode()}")
    _, size = n.nvrtcGetCUBINSize(program)
    cubin = b" " * size
    n.nvrtcGetCUBIN(program, cubin)
    return cubin


def dynamic_shared(kernel: str) -> int:
    """The most dynamic shared memory the launchers ask for, in the shapes the numbers are promised for."""
    if "columns" in kernel:
        return STAGE
    if kernel.startswith("fw_products"):
        return (2 * TOGETHER + 1) * _cuda.THREADS * 4
    return 2 * _cuda.THREADS * 4 if "step_products" in kernel else 0


def kept_rows(name: str, arch: int) -> dict[str, dict[str, Any]]:
    """:func:`rows`, from the last time when nothing that they follow from has changed since: they take seconds."""
    tools = [importlib.metadata.version(d) for d in ("nvidia-cuda-nvrtc", "triton")]  # the disassemblers are Triton's
    given = repr((name, arch, _cupy.source(name), _cupy.OPTIONS, tools, _cuda.THREADS, TOGETHER, STAGE)).encode()
    readers = [Path(f).read_bytes() for f in (__file__, Path(__file__).with_name("occupancy.py"))]
    folder = Path(tempfile.gettempdir()) / f"fastmerge-nvrtc-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    file = folder / f"{hashlib.sha256(given + b''.join(readers)).hexdigest()[:16]}.json"
    if not file.exists():
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(rows(name, arch)))
        part.rename(file)  # two processes may be at it
    found: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return found


def rows(name: str, arch: int) -> dict[str, dict[str, Any]]:
    """{kernel: resources} of one source for one target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compile_source(name, arch))
        f.flush()
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", f.name], capture_output=True, text=True)
        sass = subprocess.run([_tool("nvdisasm"), "-c", f.name], capture_output=True, text=True).stdout
    code = {m[1]: m[2] for m in re.finditer(r"\.section\s+\.text\.(\w+),(.*?)(?=\.section\s+\.|\Z)", sass, re.S)}
    found = {}
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for kernel, registers, stack, shared, local in re.findall(pattern, usage.stdout + usage.stderr):
        memory = MEMORY.findall(code[kernel])
        assert memory, f"nvdisasm printed no memory instruction of {kernel}"
        # From sm_90 on cuobjdump counts the kilobyte the system takes, which occupancy() adds by itself.
        total = int(shared) - (RESERVED if arch >= 90 else 0) + dynamic_shared(kernel)
        found[kernel] = {
            "registers": int(registers),
            "spills": sum(i.startswith(("LDL", "STL")) for i in memory) + int(stack) + int(local),
            "shared": total,
            "wide_loads": sum(i.startswith("LD") and ".128" in i for i in memory),
            "wide_stores": sum(i.startswith("ST") and ".128" in i for i in memory),
            "fma": len(re.findall(r"\bFFMA|\bDFMA", code[kernel])),
            # Not F2I.FTZ, which is part of an integer division.
            "ftz": len(re.findall(r"\b(?:FADD|FMUL|FFMA|FSETP|FMNMX|F2F|F2FP)[A-Z0-9_.]*\.FTZ", code[kernel])),
            "occupancy": round(occupancy(arch, int(registers), total, _cuda.THREADS), 3),
        }
    assert found, f"cuobjdump printed no resource usage: {usage.stdout}{usage.stderr}"
    return found


def table() -> dict[str, dict[str, dict[str, Any]]]:
    """{target: {kernel: resources}}."""
    jobs = [(name, arch) for arch in TARGETS for name in _cupy.SOURCES]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: kept_rows(*job), jobs)
    found: dict[str, dict[str, Any]] = {f"sm_{arch}": {} for arch in TARGETS}
    for (_, arch), part in zip(jobs, results, strict=True):
        found[f"sm_{arch}"] |= part
    return found


def compare(new: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """In which respects kernels are worse than the committed table."""
    bad = []
    for target, kernels in committed.items():
        for kernel, old in kernels.items():
            row = new[target].get(kernel)
            if row is None:
                bad.append(f"{target} {kernel}: is gone")
                continue
            worse = [k for k in ("registers", "spills", "shared") if row[k] > old[k]]
            worse += [k for k in ("wide_loads", "wide_stores", "occupancy") if row[k] < old[k]]
            bad += [f"{target} {kernel}: {k} {old[k]} -> {row[k]}" for k in worse]
        bad += [f"{target} {kernel}: not in the table" for kernel in new[target] if kernel not in kernels]
    return bad


if __name__ == "__main__":
    present = table()
    if "--out" in sys.argv:
        Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(present))
    elif "--write" in sys.argv:
        TABLE.write_text(json.dumps(present, indent=1, sort_keys=True) + "\n")
    else:
        problems = compare(present, json.loads(TABLE.read_text()))
        print("\n".join(problems) or "no kernel got worse")
        sys.exit(bool(problems))

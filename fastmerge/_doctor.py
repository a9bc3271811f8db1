"""What this installation can do on this machine, and why not more. Nothing here fails: what is missing is a sentence."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "triton",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "huggingface_hub",
    "ray",
    "mergekit",
)
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16")


def doctor() -> dict[str, Any]:
    """CPU, threads, OpenMP runtimes, torch, GPU and toolchains, what was built, and who would run each operator.

    Returns a dict that json can write. Loads torch and the native module, takes about as long as importing torch, and
    never raises for a missing driver, compiler or package.
    """
    from . import __version__

    native, gpu = _native_module(), _gpu()
    return {
        "fastmerge": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory": _memory(),
        "native": native,
        "torch": _torch(),
        "gpu": gpu,
        "engine": _engine(),
        "toolchain": _toolchain(),
        "openmp_runtimes": _openmp_runtimes(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backend_requested": os.environ.get("FASTMERGE_BACKEND") or None,
        "ops": _ops(gpu),
        "advice": _advice(native, gpu),
    }


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError:
        return ""


def _cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", info)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    have = set(flags[1].split()) if flags else set()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": name[1].strip() if name else platform.processor() or platform.machine(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": usable,
        "features": [f for f in _FEATURES if f in have],
    }


def _memory() -> dict[str, Any]:
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    huge = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "total_bytes": int(found["MemTotal"]) * 1024 if "MemTotal" in found else None,
        "available_bytes": int(found["MemAvailable"]) * 1024 if "MemAvailable" in found else None,
        "transparent_huge_pages": huge[1] if huge else None,
    }


def _native_module() -> dict[str, Any]:
    from . import _native

    reason = _native.why_not()
    if reason is not None:
        return {"loaded": False, "why_not": reason}
    info = dict(_native.lib().build_info())
    if info["cuda"] is None:
        info["cuda_why_not"] = "built with FASTMERGE_BUILD=cpu, or without an nvcc on PATH"
    return {"loaded": True, "why_not": None, "threads": _native.threads(), **info}


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _gpu() -> dict[str, Any]:
    """Asks the driver itself (libcuda), which answers whatever torch was built for."""
    out: dict[str, Any] = {"driver": None, "devices": [], "why_not": None}
    kernel = re.search(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version"))
    out["driver"] = kernel[1] if kernel else None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return out | {"why_not": "no NVIDIA driver (libcuda.so.1 is not there)"}
    if (status := cuda.cuInit(0)) != 0:
        return out | {"why_not": f"the driver reports error {status} (no device, or no permission)"}
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    out["cuda_of_driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    for i in range(count.value):
        name, size, major, minor = ctypes.create_string_buffer(256), ctypes.c_size_t(), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetName(name, 256, i)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), i)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, i)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, i)
        out["devices"].append(
            {
                "name": name.value.decode(),
                "memory_bytes": size.value,
                "compute_capability": f"{major.value}.{minor.value}",
            }
        )
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        out["why_not"] = f"torch can not use the GPU: it is {built}"
    return out


def _toolchain() -> dict[str, Any]:
    return {
        "nvcc": _first_line("nvcc", "--version", r"release ([\d.]+)"),
        "nvrtc": _nvrtc(),
        "gcc": _first_line("gcc", "--version", r"(\d+\.\d+(?:\.\d+)?)"),
        "triton": _importable("triton", "fastmerge[triton]"),
        "cupy": _importable("cupy", "fastmerge[gpu12]"),
        "cuda_kernels": _cuda_kernels(),
    }


def _cuda_kernels() -> str:
    """What would run the CUDA C++ kernels on the first GPU, and why what is preferred to it would not."""
    import torch

    from ._cuda import executor

    found, reasons = executor(torch.device("cuda", 0))
    if found is None:
        return f"none: {reasons}"
    name = "nvcc build" if type(found).__name__ == "Compiled" else "NVRTC through CuPy"
    return f"{name} ({reasons})" if reasons else name


def _engine() -> dict[str, Any]:
    """What `--device` may name here; the plan of a merge (--dry-run) says which one `auto` takes for it, and why."""
    from .device import cuda

    reason = cuda.why_none()
    return {"devices": ["cpu", *(d.name for d in cuda.devices())], "why_not_cuda": reason}


def _first_line(program: str, argument: str, pattern: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        return None
    try:
        said = subprocess.run([path, argument], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, said)
    return found[1] if found else None


def _nvrtc() -> str | None:
    for major in (13, 12, 11):
        name = f"libnvrtc.so.{'11.2' if major == 11 else major}"
        try:
            ctypes.CDLL(name)
            return f"{major} ({name})"
        except OSError:
            continue
    wheels = [w for w in ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu11", "nvidia-cuda-nvrtc") if _version(w)]
    return f"from the {wheels[0]} wheel" if wheels else None


def _importable(module: str, extra: str) -> str:
    return "installed" if importlib.util.find_spec(module) else f"not installed (pip install '{extra}')"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _openmp_runtimes() -> list[str]:
    """OpenMP libraries mapped into this process. Two of them compete for the same cores."""
    mapped = {line.rpartition(" ")[2] for line in _read("/proc/self/maps").splitlines() if "omp" in line}
    return sorted(path for path in mapped if re.search(r"lib(gomp|iomp5|omp)[\w.-]*\.so", path))


def _ops(gpu: dict[str, Any]) -> dict[str, Any]:
    """Per operator: who would run a float32 call on CPU and on GPU tensors, and why the others would not."""
    import torch

    from . import ops
    from ._dispatch import FLOATS, Op

    out: dict[str, Any] = {}
    for name in ops.__all__:
        op = getattr(ops, name)
        if not isinstance(op, Op):
            continue
        row: dict[str, Any] = {"numerics": op.numerics, "backends": [*op.backends, "reference"]}
        case = next((c for c in op.cases if FLOATS[0] in c.dtypes), None)
        for device in ("cpu", "cuda"):
            if device == "cuda" and (gpu["why_not"] or not gpu["devices"]):
                row["cuda"], row["cuda_why_not"] = None, {"every backend": gpu["why_not"] or "no GPU"}
            elif case is not None:
                args, kwargs = _moved(case.make(torch.Generator().manual_seed(0), torch.float32), device)
                said = op.explain(*args, **kwargs)
                row[device] = said.chosen
                row[f"{device}_why_not"] = {who: why for who, why in said.reasons if why is not None}
        out[name] = row
    return out


def _moved(value: Any, device: str) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return type(value)(_moved(v, device) for v in value) if isinstance(value, (list, tuple)) else value


def _advice(native: dict[str, Any], gpu: dict[str, Any]) -> list[str]:
    out = []
    if not native["loaded"]:
        out.append(f"native kernels are off: {native['why_not']}. Reinstall with a C++17 compiler for the fast path.")
    elif gpu["devices"] and _cuda_kernels().startswith("none"):
        major = (gpu.get("cuda_of_driver") or "12").partition(".")[0]
        extra = "gpu13" if major.isdigit() and int(major) >= 13 else "gpu12"
        out.append(
            f"there is a GPU, but nothing runs the CUDA kernels ({_cuda_kernels().removeprefix('none: ')}): "
            f"pip install 'fastmerge[{extra}]' compiles them with NVRTC through CuPy, or reinstall with nvcc and "
            "FASTMERGE_BUILD=cuda."
        )
    runtimes = _openmp_runtimes()
    if len({os.path.basename(path).split(".")[0] for path in runtimes}) > 1:
        out.append(
            f"several OpenMP runtimes are loaded ({', '.join(runtimes)}): set OMP_NUM_THREADS to avoid oversubscription."
        )
    if sys.platform != "linux":
        out.append("only Linux is tested.")
    return out

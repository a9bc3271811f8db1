"""FR-Merging against the published procedure, same tensors, same run.

    python -m fastmerge.benchmarks.merges.fr_published                   # 8 models of one fp32 4096 x 4096 matrix
    python -m fastmerge.benchmarks.merges.fr_published --model FOLDER    # whole checkpoints, made in FOLDER

The published procedure, per model and tensor: two int64 coordinate grids and their float32 distance, three masks, one
complex forward and three complex inverse transforms (one of them discarded), then a sum with a constant coefficient.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

LAMBDA = 0.15


def published_filter(v: Tensor, ratio: float = 0.7) -> Tensor:
    """The released filter, spelled out from its description: discs around index (H // 2, W // 2), added."""
    height, width = v.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = torch.sqrt((x - width // 2) ** 2 + (y - height // 2) ** 2)
    inner, outer = min(height, width) // 10, ratio * min(height, width)
    spectrum = torch.fft.fft2(v)
    parts = [distance <= inner, (distance >= inner) & (distance <= outer), distance > outer]
    low, band, _ = (torch.fft.ifft2(spectrum * p).real for p in parts)
    return low + band


def published(base: Tensor, models: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(base.shape)
    for m in models:
        total += published_filter(m.float() - base.float())
    return (base.float() + LAMBDA * total).to(base.dtype)


def timed(f: Callable[[], Tensor]) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    result = f()
    return time.perf_counter() - begin, result


def one_tensor(size: int, count: int, rounds: int) -> dict[str, object]:
    """The same matrix of `count` models merged by both; our masks: the published one, and the paper's."""
    import fastmerge as fm

    g = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(size, size, generator=g) * 0.02}
    models = [{"w": base["w"] + torch.randn(size, size, generator=g) * 0.002} for _ in range(count)]
    rows: dict[str, list[float]] = {"published": [], "fr preset vit30": [], "fr": []}
    error = 0.0
    # One small merge first: the first transform of a process sets up torch's FFT library, on either side.
    fm.merge("fr", {"w": base["w"][:64, :64]}, [{"w": models[0]["w"][:64, :64]}])
    published_filter(base["w"][:64, :64])
    for _ in range(rounds):
        seconds, want = timed(lambda: published(base["w"], [m["w"] for m in models]))
        rows["published"].append(seconds)
        for key, kwargs in (
            ("fr preset vit30", {"preset": "vit30", "select": "", "lambda_": LAMBDA}),
            ("fr", {}),
        ):
            names = {"output.weight": base["w"]}, [{"output.weight": m["w"]} for m in models]
            seconds, got = timed(lambda: fm.merge("fr", *names, nan="allow", **kwargs)["output.weight"])  # noqa: B023
            rows[key].append(seconds)
            if kwargs:
                error = float((got - want).abs().max() / (want - base["w"]).abs().max())
    median = {k: statistics.median(v) for k, v in rows.items()}
    return {
        "what": f"{count} models, fp32 {size} x {size}",
        "seconds": median,
        "times the published procedure": {k: median["published"] / v for k, v in median.items()},
        "largest difference of the merged delta, relative": error,
    }


def child(code: str, *arguments: str) -> dict[str, object]:
    """Run `code` in a fresh interpreter: its CPU seconds and peak memory are its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    out: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return out


_MERGE = """
import json, resource, sys, time
begin = time.perf_counter()
import fastmerge as fm
kwargs = json.loads(sys.argv[2])
fm.merge("fr", sys.argv[3], sys.argv[4:], out=sys.argv[1], **kwargs)
u = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"wall s": time.perf_counter() - begin, "CPU s": u.ru_utime + u.ru_stime, "peak RSS GB": u.ru_maxrss / 1e6}))
"""


def whole_model(folder: Path) -> dict[str, object]:
    """Checkpoints in, checkpoint out; the published procedure on the same tensors, in memory, without any I/O."""
    from safetensors import safe_open

    from .checkpoints import family

    paths = family(folder)
    out = folder / "merged"
    rows: dict[str, object] = {}
    for key, kwargs in (
        ("fr", {}),
        ("fr, embeddings not filtered", {"select": "layers"}),
        ("fr preset vit30 masks", {"preset": "vit30", "select": ""}),
    ):
        shutil.rmtree(out, ignore_errors=True)
        rows[key] = child(_MERGE, str(out), json.dumps(kwargs), *map(str, paths))
    shutil.rmtree(out, ignore_errors=True)
    wall, cpu = 0.0, 0.0
    index = json.loads((paths[0] / "model.safetensors.index.json").read_text())["weight_map"]
    for name, shard in index.items():
        tensors = []
        for p in paths:
            with safe_open(p / shard, "pt") as f:
                tensors.append(f.get_tensor(name))
        if tensors[0].ndim != 2:
            continue
        begin, cpu_begin = time.perf_counter(), time.process_time()
        # One model's filter is timed and counted once per model: all four cost the same.
        published_filter(tensors[1].float() - tensors[0].float())
        wall += (time.perf_counter() - begin) * (len(tensors) - 1)
        cpu += (time.process_time() - cpu_begin) * (len(tensors) - 1)
    rows["published procedure, arithmetic only (one model timed, times four)"] = {
        "wall s": wall,
        "CPU s": cpu,
        "peak RSS GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="merge whole checkpoints made in this folder (5 GB)")
    arguments = parser.parse_args()
    report = (
        whole_model(arguments.model)
        if arguments.model
        else one_tensor(arguments.size, arguments.models, arguments.rounds)
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

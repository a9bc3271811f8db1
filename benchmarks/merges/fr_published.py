"""FR-Merging against the published procedure, same tensors, same run.

    python -m fastmerge.benchmarks.merges.fr_published                          # 8 models of one fp32 4096 x 4096 matrix
    python -m fastmerge.benchmarks.merges.fr_published --checkpoints BASE MODEL...   # whole checkpoints
    python -m fastmerge.benchmarks.merges.fr_published --model FOLDER           # the same, made in FOLDER (5 GB)

The published procedure, per model and tensor: two int64 coordinate grids and their float32 distance, three masks, one
complex forward and three complex inverse transforms (one of them discarded), then a sum with a constant coefficient.

Of whole checkpoints, the merges' CPU seconds and peak memory are those of a process, as a user starts it. The published
procedure takes minutes for all of them, so that the two are compared on the tensors that `--tensors` matches: copied
out to checkpoints of their own, then merged from files to a file by either, in one process, imports left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
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


_MERGE = """
import json, sys
import fastmerge as fm
fm.merge("fr", sys.argv[3], sys.argv[4:], out=sys.argv[1], **json.loads(sys.argv[2]))
"""


def child(*arguments: str) -> dict[str, float]:
    """One merge in a fresh interpreter: all of its CPU seconds, and its peak memory."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", _MERGE, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the merge ended with {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall s": time.perf_counter() - begin, "CPU s": cpu, "peak RSS GB": usage.ru_maxrss / 1e6}


def whole_model(paths: Sequence[Path], rounds: int) -> dict[str, object]:
    """Checkpoints in, checkpoint out, with and without the embeddings' filter."""
    rows: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=paths[0].parent) as folder:
        for key, kwargs in (("fr", {}), ("fr, embeddings not filtered", {"select": "layers"})):
            each = [child(f"{folder}/{key}-{i}", json.dumps(kwargs), *map(str, paths)) for i in range(rounds)]
            rows[key] = sorted(each, key=lambda r: r["CPU s"])[len(each) // 2]
            for i in range(rounds):
                shutil.rmtree(f"{folder}/{key}-{i}")
    return rows


def _tensors(path: Path, pattern: str) -> dict[str, Tensor]:
    from safetensors import safe_open

    out: dict[str, Tensor] = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            out |= {k: f.get_tensor(k) for k in f.keys() if re.search(pattern, k)}  # noqa: SIM118
    return out


def published_merge(paths: Sequence[Path], out: Path) -> None:
    """The published procedure from files to a file; what is not a matrix is summed unfiltered."""
    from safetensors.torch import load_file, save_file

    base, *models = (load_file(p / "model.safetensors") for p in paths)
    merged = {}
    for name, tensor in base.items():
        each = [m[name] for m in models]
        if tensor.ndim == 2:
            merged[name] = published(tensor, each)
        else:
            delta = torch.stack([m.float() - tensor.float() for m in each]).sum(0)
            merged[name] = (tensor.float() + LAMBDA * delta).to(tensor.dtype)
    save_file(merged, out)


def same_tensors(paths: Sequence[Path], pattern: str) -> dict[str, object]:
    """Both procedures on the tensors that `pattern` matches, from files to a file."""
    from safetensors.torch import load_file, save_file

    import fastmerge as fm

    with tempfile.TemporaryDirectory(dir=paths[0].parent) as folder:
        parts = []
        for i, path in enumerate(paths):
            parts.append(Path(folder) / f"part{i}")
            parts[-1].mkdir()
            chosen = _tensors(path, pattern)
            if not chosen:
                raise SystemExit(f"no tensor of {path} matches {pattern!r}")
            save_file(chosen, parts[-1] / "model.safetensors")
        elements = sum(t.numel() for t in chosen.values())
        small = torch.randn(64, 64)
        published_filter(small)
        fm.merge("fr", {"w": small}, [{"w": small}])
        rows: dict[str, object] = {"tensors": len(chosen), "elements": elements}
        times: dict[str, tuple[float, float]] = {}
        options = {"mask": "disc_min", "ring_double": True, "lambda_policy": "constant", "lambda_": LAMBDA}
        runs: list[tuple[str, Callable[[], object]]] = [
            ("fr", lambda: fm.merge("fr", str(parts[0]), list(map(str, parts[1:])), out=f"{folder}/fr")),
            ("fr, published mask and coefficients", lambda: fm.merge(
                "fr", str(parts[0]), list(map(str, parts[1:])), out=f"{folder}/same", **options)),
            ("published", lambda: published_merge(parts, Path(folder) / "published.safetensors")),
        ]  # fmt: skip
        for key, merge in runs:
            wall, cpu = time.perf_counter(), time.process_time()
            merge()
            times[key] = time.perf_counter() - wall, time.process_time() - cpu
            rows[key] = {"wall s": times[key][0], "CPU s": times[key][1]}
        for key in times:
            if key != "published":
                ratios = [a / b for a, b in zip(times["published"], times[key], strict=True)]
                rows[f"times the published procedure: {key}"] = {"wall": ratios[0], "CPU": ratios[1]}
        want = load_file(f"{folder}/published.safetensors")
        got = _tensors(Path(folder) / "same", "")
        differ: dict[str, float] = {}  # by shape: see docs/performance.md for 2048x2048
        for k, v in got.items():
            error = (v.float() - want[k].float()).abs().max() / want[k].float().abs().max()
            shape = "x".join(map(str, v.shape))
            differ[shape] = max(differ.get(shape, 0.0), float(error))
        rows["largest difference of merged weights, relative"] = differ
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--checkpoints", type=Path, nargs="+", metavar="PATH", help="a base and its models")
    where.add_argument("--model", type=Path, help="merge checkpoints made in this folder (5 GB)")
    parser.add_argument("--tensors", default=r"layers\.0\.", help="regular expression: where both are run")
    parser.add_argument("--only", choices=("whole", "tensors"), help="one of the two measurements of checkpoints")
    arguments = parser.parse_args()
    if not (arguments.checkpoints or arguments.model):
        print(json.dumps(one_tensor(arguments.size, arguments.models, arguments.rounds), indent=2))
        return
    if arguments.model:
        from .checkpoints import family

        paths = family(arguments.model)
    else:
        paths = arguments.checkpoints
    report: dict[str, object] = {}
    if arguments.only != "tensors":
        report["whole checkpoints"] = whole_model(paths, arguments.rounds)
    if arguments.only != "whole":
        report[f"tensors {arguments.tensors}"] = same_tensors(paths, arguments.tensors)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

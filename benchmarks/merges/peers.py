"""Whole merges, fastmerge and mergekit side by side: wall, CPU seconds, peak memory, and how far the results agree.

python -m fastmerge.benchmarks.merges.peers FOLDER [METHOD ...] [--mergekit PYTHON] [--repeat N] [--save rows.jsonl]

Makes base and four models of 1.01 GB each under FOLDER once (checkpoints.py), and a virtual environment for mergekit
unless one is given. Every merge is a process of its own, started as a user would, on a warm page cache; CPU seconds and
peak resident memory are the kernel's (wait4), so that mergekit's count includes the input pages it maps. Agreement: the
two results against each other, and each against the same rule in float64, as |difference| / |merged - base| (RMS).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MERGEKIT = ("mergekit==0.1.5", "torch==2.13.0")
METHODS: dict[str, str] = {
    "linear": "parameters: {weight: 0.25}",
    "task_arithmetic": "base_model: {base}\nparameters: {weight: 0.3}",
    "ties": "base_model: {base}\nparameters: {weight: 1, density: 0.2}",
}


@dataclass
class Row:
    """One merge. Seconds and bytes."""

    method: str
    program: str
    wall_s: float
    cpu_s: float
    peak_rss: int
    moved: int  # bytes of inputs used and output
    out: str


def recipe(method: str, folder: Path) -> Path:
    """The YAML both programs are given."""
    models = "\n".join(f"  - model: {folder / f'model{i}'}" for i in range(1, 5))
    text = f"merge_method: {method}\nmodels:\n{models}\n{METHODS[method].replace('{base}', str(folder / 'base'))}\ndtype: bfloat16\n"
    path = folder / f"{method}.yml"
    path.write_text(text)
    return path


def environment(folder: Path) -> Path:
    """The Python of mergekit's own virtual environment, made on first use."""
    python = folder / "mergekit-venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "mergekit-venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *MERGEKIT], check=True)
    return python


def run(command: list[str], log: Path) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak resident bytes of a process; SystemExit with its log when it fails."""
    with log.open("wb") as f:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command} failed:\n{log.read_text()[-2000:]}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def warm(folder: Path) -> int:
    """Reads the checkpoint's weights into the page cache; returns their bytes."""
    total, buffer = 0, bytearray(1 << 24)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as f:
            while got := f.readinto(buffer):
                total += got
    return total


def measure(method: str, program: str, folder: Path, mergekit: Path) -> Row:
    path, out = recipe(method, folder), folder / f"out-{program}-{method}"
    shutil.rmtree(out, ignore_errors=True)
    inputs = [*(["base"] if "base" in METHODS[method] else []), *(f"model{i}" for i in range(1, 5))]
    moved = sum(warm(folder / name) for name in inputs)
    if program == "mergekit":
        command = [str(mergekit.with_name("mergekit-yaml")), str(path), str(out)]
        command += ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    else:
        command = [sys.executable, "-m", "fastmerge.cli", "merge", str(path), str(out), "--quiet", "--force"]
    wall, cpu, rss = run(command, folder / f"log-{program}-{method}")
    moved += sum(f.stat().st_size for f in out.glob("*.safetensors"))
    return Row(method, program, wall, cpu, rss, moved, str(out))


def agreement(method: str, folder: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """Relative RMS differences of merged deltas over all tensors (against each other) and over those of up to 5 million
    elements (each against float64)."""

    from fastmerge import ops
    from fastmerge.io.checkpoint import open_checkpoint

    sources = {n: open_checkpoint(folder / n) for n in ["base", *(f"model{i}" for i in range(1, 5))]}
    got, want = open_checkpoint(ours), open_checkpoint(theirs)
    sums = {k: 0.0 for k in ("mutual", "ours", "theirs", "rounding", "delta", "small delta")}
    for name in sources["base"].names():
        a, b, base = (_tensor(c, name) for c in (got, want, sources["base"]))
        sums["mutual"] += float((a - b).double().square().sum())
        sums["delta"] += float((b - base).double().square().sum())
        if base.numel() > 5_000_000:
            continue
        wide, models = base.double(), [_tensor(sources[f"model{i}"], name).double() for i in range(1, 5)]
        if method == "linear":
            exact = ops.weighted_sum(None, models, 0.25, normalize=True, backend="reference")
        elif method == "task_arithmetic":
            exact = ops.weighted_sum(wide, models, 0.3, backend="reference")
        else:
            exact = ops.consensus_merge(
                wide, models, 1.0, 0.2, trim="topk", elect="sum", normalize=True, backend="reference"
            )
        sums["small delta"] += float((exact - wide).square().sum())
        sums["rounding"] += float((exact.bfloat16() - exact).square().sum())
        sums["ours"] += float((a - exact).square().sum())
        sums["theirs"] += float((b - exact).square().sum())
        del exact, models
    return {
        "fastmerge vs mergekit": (sums["mutual"] / sums["delta"]) ** 0.5,
        "fastmerge vs float64": (sums["ours"] / sums["small delta"]) ** 0.5,
        "mergekit vs float64": (sums["theirs"] / sums["small delta"]) ** 0.5,
        "float64 stored as bfloat16": (sums["rounding"] / sums["small delta"]) ** 0.5,
    }


def _tensor(checkpoint: Any, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(checkpoint.folder / checkpoint.shard_of(name), "pt") as f:
        return f.get_tensor(name).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", default=list(METHODS))
    parser.add_argument("--mergekit", type=Path, help="the python of an environment that has mergekit")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the one with the least CPU seconds counts")
    parser.add_argument("--save", type=Path, help="append rows to this JSONL file")
    parser.add_argument("--agree", nargs=3, metavar=("METHOD", "OURS", "THEIRS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder.absolute()
    if given.agree:  # in a process of its own: this one must stay small, a child's peak counts its parent's at birth
        method, ours, theirs = given.agree
        print(json.dumps(agreement(method, folder, Path(ours), Path(theirs))))
        return
    unknown = set(given.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"no such merge here: {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    subprocess.run([sys.executable, "-m", "fastmerge.benchmarks.merges.checkpoints", str(folder)], check=True)
    mergekit = given.mergekit or environment(folder)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {platform.platform()}")
    print(f"{'method':<17}{'program':<11}{'wall s':>8}{'CPU s':>8}{'peak GB':>9}{'GB/s':>7}")
    for method in given.methods:
        rows = {}
        for program in ("mergekit", "fastmerge"):
            runs = [measure(method, program, folder, mergekit) for _ in range(given.repeat)]
            row = rows[program] = min(runs, key=lambda r: r.cpu_s)
            speed = row.moved / row.wall_s / 1e9
            print(
                f"{method:<17}{program:<11}{row.wall_s:>8.1f}{row.cpu_s:>8.1f}{row.peak_rss / 1e9:>9.2f}{speed:>7.2f}",
                flush=True,
            )
        mk, fm = rows["mergekit"], rows["fastmerge"]
        print(
            f"{'':<17}{'ratio':<11}{mk.wall_s / fm.wall_s:>8.1f}{mk.cpu_s / fm.cpu_s:>8.1f}{mk.peak_rss / fm.peak_rss:>9.1f}"
        )
        said = subprocess.run(
            [sys.executable, "-m", "fastmerge.benchmarks.merges.peers", str(folder), "--agree", method, fm.out, mk.out],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        agree = json.loads(said.stdout)
        print(f"{'':<17}" + ", ".join(f"{k} {v:.2%}" for k, v in agree.items()), flush=True)
        if given.save:
            with given.save.open("a") as f:
                f.writelines(json.dumps({**asdict(r), "agreement": agree}) + "\n" for r in rows.values())


if __name__ == "__main__":
    main()

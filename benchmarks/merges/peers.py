"""Whole merges side by side, fastmerge, mergekit and plain PyTorch: wall, CPU seconds, peak memory, and agreement.

python -m fastmerge.benchmarks.merges.peers FOLDER [METHOD ...] [--all] [--layers N] [--hidden N] [--vocabulary N]
    [--mergekit PYTHON] [--fusion-bench PYTHON] [--programs NAME ...] [--repeat N] [--save rows.jsonl] [--memory]

Makes base and four models under FOLDER once (checkpoints.py; 1.01 GB each without options), and a virtual environment for
mergekit unless one is given; FusionBench takes part where its environment is given. Every merge is a process of its own, started as a user would, on a warm page cache; CPU
seconds and peak resident memory are the kernel's (wait4), so that a program's count includes the input pages it maps.
Agreement: |difference| / |merged - base| (RMS) of the results with one another, and with plain.py's formula in float64.
Random methods draw differently everywhere: for them the table says how long each merged delta is instead.

--memory merges checkpoints of 1x, 2x and 4x the layers with fastmerge alone and compares the peaks.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MERGEKIT = ("mergekit==0.1.5", "torch==2.13.0")


@dataclass(frozen=True)
class Scenario:
    """A method's parameters, the same for every program."""

    parameters: dict[str, Any] = field(default_factory=dict)
    base: bool = True
    models: int = 4
    random: bool = False
    ours: dict[str, Any] = field(default_factory=dict)  # what makes fastmerge do what mergekit does


W = {"weight": 0.3}
METHODS: dict[str, Scenario] = {
    "linear": Scenario({"weight": 0.25}, base=False),
    "task_arithmetic": Scenario(W),
    "ties": Scenario({"weight": 1, "density": 0.2}),
    "dare_linear": Scenario({**W, "density": 0.2}, random=True),
    "dare_ties": Scenario({**W, "density": 0.2}, random=True),
    "breadcrumbs": Scenario({**W, "density": 0.9, "gamma": 0.01}),
    "breadcrumbs_ties": Scenario({**W, "density": 0.9, "gamma": 0.01}),
    "della_linear": Scenario({**W, "density": 0.3, "epsilon": 0.1}, random=True),
    "della": Scenario({**W, "density": 0.3, "epsilon": 0.1}, random=True),
    "slerp": Scenario({"t": 0.5}, models=1),
    "nuslerp": Scenario({"weight": 0.5}, base=False, models=2),
    "multislerp": Scenario({"weight": 0.25}, base=False),
    "karcher": Scenario(base=False),
    "model_stock": Scenario(),
    "nearswap": Scenario({"t": 0.001}, models=1),
    "sce": Scenario({"select_topk": 0.2}, ours={"uniform_below": 1e-6}),
    "ram": Scenario(),
    "ramplus_tl": Scenario(),
    "arcee_fusion": Scenario(models=1),
    "passthrough": Scenario(base=False, models=1),
}
DEFAULT = ("linear", "task_arithmetic", "ties")
PROGRAMS = ("mergekit", "fusion_bench", "plain", "fastmerge")
FUSION = ("linear", "task_arithmetic", "ties")  # what fusion.py can do


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


def recipe(method: str, program: str, folder: Path) -> Path:
    """The YAML of one program: the same for both but for names that only one of them has."""
    scenario = METHODS[method]
    names = [*(["base"] if scenario.base and scenario.models == 1 else []), *_models(scenario)]
    data: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folder / name)} for name in names],
        "parameters": {**scenario.parameters, **(scenario.ours if program == "fastmerge" else {})},
        "dtype": "bfloat16",
        **({"base_model": str(folder / "base")} if scenario.base else {}),
    }
    path = folder / f"{method}-{program}.yml"
    path.write_text(json.dumps(data, indent=1))  # JSON is YAML
    return path


def _models(scenario: Scenario) -> list[str]:
    return [f"model{i}" for i in range(1, 1 + scenario.models)]


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


def measure(method: str, program: str, folder: Path, mergekit: Path | None, fusion: Path | None = None) -> Row:
    scenario, out = METHODS[method], folder / f"out-{program}-{method}"
    shutil.rmtree(out, ignore_errors=True)
    inputs = [*(["base"] if scenario.base else []), *_models(scenario)]
    moved = sum(warm(folder / name) for name in inputs)
    if program == "mergekit":
        assert mergekit is not None
        command = [str(mergekit.with_name("mergekit-yaml")), str(recipe(method, program, folder)), str(out)]
        command += ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    elif program == "fusion_bench":
        command = [str(fusion), str(Path(__file__).with_name("fusion.py")), method, json.dumps(scenario.parameters)]
        command += [str(out), str(folder / inputs[0]), *(str(folder / name) for name in _models(scenario))]
    elif program == "plain":
        command = [sys.executable, "-m", "fastmerge.benchmarks.merges.plain", method, json.dumps(scenario.parameters)]
        command += [str(out), str(folder / inputs[0]), *(str(folder / name) for name in _models(scenario))]
    else:
        command = [sys.executable, "-m", "fastmerge.cli", "merge", str(recipe(method, program, folder)), str(out)]
        command += ["--quiet", "--force"]
    wall, cpu, rss = run(command, folder / f"log-{program}-{method}")
    moved += sum(f.stat().st_size for f in out.glob("*.safetensors"))
    return Row(method, program, wall, cpu, rss, moved, str(out))


def agreement(method: str, folder: Path, outs: dict[str, Path], limit: int = 5_000_000) -> dict[str, float]:
    """Over the tensors of up to `limit` elements, in units of the float64 result's delta: distances or, for random
    methods, lengths."""
    import torch

    from fastmerge.io.checkpoint import open_checkpoint

    from .plain import MERGES

    scenario = METHODS[method]
    torch.manual_seed(0)
    checkpoints = {n: open_checkpoint(folder / n) for n in ["base", *_models(scenario)]}
    results = {p: open_checkpoint(out) for p, out in outs.items()}
    sums: dict[str, float] = {}

    def add(key: str, value: Any) -> None:
        sums[key] = sums.get(key, 0.0) + float(value.double().square().sum())

    for name in checkpoints["base"].names():
        if torch.Size(checkpoints["base"].shape(name)).numel() > limit:
            continue
        base, *models = (_tensor(c, name).double() for c in checkpoints.values())
        exact = MERGES[method](base if scenario.base else models[0], models, scenario.parameters)
        got = {p: _tensor(c, name).double() for p, c in results.items()}
        add("delta", exact - base)
        add("float64 stored as bfloat16", exact.bfloat16().double() - exact)
        for program, merged in got.items():
            if scenario.random:
                add(f"{program} delta length", merged - base)
            else:
                add(f"{program} vs float64", merged - exact)
        if not scenario.random and {"fastmerge", "mergekit"} <= got.keys():
            add("fastmerge vs mergekit", got["fastmerge"] - got["mergekit"])
    delta = sums.pop("delta") or 1.0
    return {key: (value / delta) ** 0.5 for key, value in sums.items()}


def _tensor(checkpoint: Any, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(checkpoint.folder / checkpoint.shard_of(name), "pt") as f:
        return f.get_tensor(name).float()


def memory(folder: Path, methods: Sequence[str], hidden: int, vocabulary: int) -> None:
    """fastmerge's peak for checkpoints of 1, 2 and 4 layers; SystemExit(1) where it grows by more than 5 %."""
    print(f"{'method':<17}{'layers':>7}{'model GB':>10}{'peak GB':>9}{'of one layer':>14}")
    grown = []
    for method in methods:
        peaks = []
        for layers in (1, 2, 4):
            here = folder / f"layers{layers}"
            _checkpoints(here, layers, hidden, vocabulary)
            row = measure(method, "fastmerge", here, None)
            peaks.append(row.peak_rss)
            size = sum(f.stat().st_size for f in Path(row.out).glob("*.safetensors"))
            ratio = row.peak_rss / peaks[0]
            print(f"{method:<17}{layers:>7}{size / 1e9:>10.2f}{row.peak_rss / 1e9:>9.3f}{ratio:>14.3f}", flush=True)
            shutil.rmtree(row.out)
        if max(peaks) > 1.05 * peaks[0]:
            grown.append(method)
    if grown:
        raise SystemExit(f"peak memory grows with the model: {', '.join(grown)}")


def _checkpoints(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """In a process of its own: this one must stay small, since a child's peak counts its parent's at birth."""
    size = ["--layers", str(layers), "--hidden", str(hidden), "--vocabulary", str(vocabulary)]
    command = [sys.executable, "-m", "fastmerge.benchmarks.merges.checkpoints", str(folder), *size]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", help=f"without one: {', '.join(DEFAULT)}")
    parser.add_argument("--all", action="store_true", help="every method that both programs have")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--mergekit", type=Path, help="the python of an environment that has mergekit")
    parser.add_argument("--fusion-bench", type=Path, help="the python of an environment that has fusion-bench")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the one with the least CPU seconds counts")
    parser.add_argument("--save", type=Path, help="append rows to this JSONL file")
    parser.add_argument("--memory", action="store_true", help="fastmerge's peak over growing models instead")
    parser.add_argument("--agree", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args()
    folder = given.folder.absolute()
    if given.agree:  # in a process of its own, as _checkpoints says
        outs = {program: Path(out) for program, out in json.loads(given.agree).items()}
        print(json.dumps(agreement(given.methods[0], folder, outs)))
        return
    methods = given.methods or (list(METHODS) if given.all else list(DEFAULT))
    unknown = set(methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"no such merge here: {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if given.memory:
        memory(folder, methods, given.hidden, given.vocabulary)
        return
    _checkpoints(folder, given.layers, given.hidden, given.vocabulary)
    mergekit = None
    if "mergekit" in given.programs:
        mergekit = given.mergekit or environment(folder)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {platform.platform()}")
    print(
        f"{'method':<17}{'program':<11}{'wall s':>8}{'CPU s':>8}{'peak GB':>9}{'GB/s':>7}   fastmerge: wall, CPU, memory"
    )
    for method in methods:
        rows: dict[str, Row] = {}
        for program in given.programs:
            if program == "fusion_bench" and (given.fusion_bench is None or method not in FUSION):
                continue
            rows[program] = min(
                (measure(method, program, folder, mergekit, given.fusion_bench) for _ in range(given.repeat)),
                key=lambda r: r.cpu_s,
            )
        ours = rows.get("fastmerge")
        for program, row in rows.items():
            times = ""
            if ours is not None and program != "fastmerge":
                ratios = (row.wall_s / ours.wall_s, row.cpu_s / ours.cpu_s, row.peak_rss / ours.peak_rss)
                times = "   " + ", ".join(f"{r:.1f}x" for r in ratios)
            print(
                f"{method:<17}{program:<11}{row.wall_s:>8.1f}{row.cpu_s:>8.1f}{row.peak_rss / 1e9:>9.2f}"
                f"{row.moved / row.wall_s / 1e9:>7.2f}{times}",
                flush=True,
            )
        said = subprocess.run(
            [
                sys.executable, "-m", "fastmerge.benchmarks.merges.peers", str(folder), method,
                "--agree", json.dumps({program: row.out for program, row in rows.items()}),
            ],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        agree = json.loads(said.stdout)
        print(f"{'':<17}" + ", ".join(f"{k} {v:.2%}" for k, v in agree.items()), flush=True)
        if given.save:
            with given.save.open("a") as f:
                f.writelines(json.dumps({**asdict(r), "agreement": agree}) + "\n" for r in rows.values())


if __name__ == "__main__":
    main()

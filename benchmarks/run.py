"""Runs the suite: ceilings, then per operator the correctness gate and the table.

``python -m fastmerge.benchmarks.run [OP ...] [--full] [--only TEXT] [--backend NAME] [--save rows.jsonl]`` (also ``fastmerge bench``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import pkgutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastmerge import _cupy, ops
from fastmerge._dispatch import REFERENCE, Op
from fastmerge.errors import BadInput

from . import gpu
from . import ops as declarations
from .declare import Bench, Variant
from .schema import Row, append
from .timing import Times, ceilings, environment, moving, side_by_side

COLUMNS = ("cpu", "triton", "cuda", "cupy")  # a backend that an operator lacks is reported as such
MACHINE = "the machine"  # what is timed beside the backends, for the ceiling
COMPILE_LIMIT = 90.0  # seconds that torch.compile may take for one size


def names() -> list[str]:
    """Operators that have a declaration."""
    return sorted(m.name for m in pkgutil.iter_modules(declarations.__path__))


def load(name: str) -> Bench:
    bench: Bench = importlib.import_module(f"{declarations.__name__}.{name}").BENCH
    return bench


def gate(op: Op[..., Any], device: torch.device) -> list[str]:
    """The operator's cases on every backend that can run them; what disagrees with the reference, in sentences."""
    wrong = []
    for case in op.cases:
        for dtype in case.dtypes:
            made = [case.make(torch.Generator().manual_seed(0), dtype) for _ in range(2)]
            (args, kwargs), (again, more) = ((_to(a, device), _to(k, device)) for a, k in made)
            want = op(*args, backend=REFERENCE, **kwargs)
            for name in op.backends:
                if op.why_not(name, *again, **more) is None:
                    got = op(*_clone(again), backend=name, **_clone(more))
                    if not _agree(got, want, op.numerics):
                        wrong.append(f"{op.name} [{name}] {case.name}, {dtype}")
    return wrong


def _to(value: Any, device: torch.device) -> Any:
    return _map(value, lambda t: t.to(device))


def _clone(value: Any) -> Any:
    return _map(value, lambda t: t.clone())


def _map(value: Any, f: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return f(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_map(v, f) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, f) for k, v in value.items()}
    return value


def _agree(got: Any, want: Any, numerics: str) -> bool:
    if isinstance(want, torch.Tensor):
        dtype = want.dtype
        if got.shape != want.shape or got.dtype != want.dtype:
            return False
        if numerics == "A" or not want.is_floating_point():
            return bool(torch.equal(torch.nan_to_num(got), torch.nan_to_num(want)))
        if not torch.equal(got.isnan(), want.isnan()) or not torch.equal(got.isinf(), want.isinf()):
            return False
        finite = want.isfinite()
        want, got = want[finite].double(), got[finite].double()
        scale = float(want.square().mean().sqrt()) if want.numel() else 0.0
        error = float((got - want).square().mean().sqrt()) if want.numel() else 0.0
        return error <= (1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4) * (scale or 1.0)
    if isinstance(want, (list, tuple)):
        return len(got) == len(want) and all(_agree(g, w, numerics) for g, w in zip(got, want, strict=True))
    return bool(got == want)


def measure(
    bench: Bench,
    variant: Variant,
    device: torch.device,
    limits: dict[str, float],
    env: dict[str, Any],
    *,
    budget: float = 1.0,
    compiled: bool = False,
    runtime: gpu.Runtime | None = None,
    backends: Sequence[str] = (),
) -> Iterator[Row]:
    """Rows of one variant: every backend that can run it, the reference, the rivals; the others with the reason.

    On the CPU the ceiling of memory is measured again in the same rounds: neighbours move it by half. `backends` are
    the only ones to time, all without one.
    """
    op: Op[..., Any] = getattr(ops, bench.op)
    args, kwargs = variant.make(device)
    runs: dict[str, Callable[..., Any]] = {}
    reasons: dict[str, str] = {}
    for name in dict.fromkeys([*op.backends, *COLUMNS, REFERENCE]):
        reason = op.why_not(name, *args, **kwargs)
        if reason is None:
            runs[name] = functools.partial(op, backend=name)
        else:
            reasons[name] = reason
    try:
        runs["torch.compile"] = _compiled(op, args, kwargs, bench) if compiled else _not_asked()
    except Unable as error:
        reasons["torch.compile"] = str(error)
    runs |= bench.rivals
    absent = (
        _cupy.Runtime().why_not(device)
        if device.type == "cuda"
        else "CuPy's arrays are on a GPU, the inputs here on the CPU"
    )
    for name, rival in bench.cupy.items():
        if absent is None:
            runs[name] = functools.partial(_with_cupy, rival)
        else:
            reasons[name] = absent
    for name in [n for n in runs if backends and n not in backends]:
        del runs[name]
        reasons[name] = "left out by --backend"
    reset = None if bench.setup is None else functools.partial(bench.setup, args)
    calls = {name: functools.partial(run, *args, **kwargs) for name, run in runs.items() if name not in bench.cupy}
    rotated = {
        name: functools.partial(_rotated, run, args, kwargs, variant.bytes, runtime)
        for name, run in runs.items()
        if name not in bench.cupy
    }
    beside, amount = moving(bench.ceiling, device) if runtime is None else (None, 0.0)
    timed = {**calls, **({} if beside is None else {MACHINE: beside})}
    times = side_by_side(timed, runtime, budget=budget, reset=reset, rotated=rotated)
    if beside is not None:
        limits = {**limits, bench.ceiling: amount / times[MACHINE].p50}
    for name in calls:
        yield row(bench, variant, name, times[name], times.get(REFERENCE), limits, env)
    for name, reason in reasons.items():
        yield Row(op=bench.op, variant=variant.name, backend=name, skipped=reason, ceilings=limits, **env)


class Unable(Exception):
    """Why a comparator can not be timed."""


def _not_asked() -> Callable[..., Any]:
    raise Unable("asked for with --compile, since compiling takes up to a minute for each size")


def _compiled(op: Op[..., Any], args: Any, kwargs: Any, bench: Bench) -> Callable[..., Any]:
    """The reference under torch.compile, if it compiles within COMPILE_LIMIT and still agrees; raises Unable."""
    torch._dynamo.reset()  # else what other operators left behind counts towards dynamo's limit of recompilations
    run: Callable[..., Any] = torch.compile(op.reference, dynamic=False)
    again, more = _clone(args), _clone(kwargs)
    try:
        with warnings.catch_warnings(), _deadline(COMPILE_LIMIT):
            warnings.simplefilter("ignore")
            got = run(*again, **more)
    except TimeoutError:
        raise Unable(f"torch.compile took more than {COMPILE_LIMIT:.0f} s") from None
    except Exception as error:  # the compiler's own, a missing C++ compiler's, ...
        said = [line for line in str(error).splitlines() if line.strip()]
        raise Unable(f"torch.compile fails: {type(error).__name__}: {said[0][:120] if said else ''}") from error
    if not _agree(got, op.reference(*_clone(args), **_clone(kwargs)), "C"):
        raise Unable("what torch.compile makes of the reference differs from it")
    return run


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """TimeoutError in the block after so many seconds; without a limit where no signal can be had."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _with_cupy(rival: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    import cupy

    def convert(value: Any) -> Any:
        return cupy.from_dlpack(value) if isinstance(value, torch.Tensor) else value

    return rival(*map(convert, args), **{k: convert(v) for k, v in kwargs.items()})


def _rotated(
    run: Callable[..., Any], args: Any, kwargs: Any, nbytes: int, runtime: gpu.Runtime | None
) -> list[Callable[[], Any]]:
    """The call on enough copies of its inputs that no input is found in the L2 cache again."""
    count = gpu.copies(nbytes, getattr(runtime, "l2_bytes", 64 << 20))
    return [functools.partial(run, *_clone(args), **_clone(kwargs)) for _ in range(count)]


def row(
    bench: Bench, variant: Variant, name: str, t: Times, reference: Times | None, limits: dict[str, float],
    env: dict[str, Any],
) -> Row:  # fmt: skip
    """What one measurement says."""
    memory, computing = variant.bytes / limits[bench.ceiling], variant.flops / limits["gemm"]
    return Row(
        op=bench.op, variant=variant.name, backend=name, timing=t.how, p20_s=t.p20, p50_s=t.p50, p80_s=t.p80, calls=t.calls,
        bytes=variant.bytes, flops=variant.flops, bytes_per_s=variant.bytes / t.p50, flops_per_s=variant.flops / t.p50,
        bound="memory" if memory >= computing else "compute", of_ceiling=max(memory, computing) / t.p50,
        speedup=None if reference is None else reference.p50 / t.p50, ceilings=limits, **env,
    )  # fmt: skip


def table(rows: Iterable[Row], title: str) -> Table:
    out = Table(title=title, title_justify="left")
    for heading in ("variant", "backend", "p20 ms", "p50 ms", "p80 ms", "GB/s", "% of ceiling", "x reference"):
        out.add_column(heading, justify="left" if heading in ("variant", "backend") else "right", no_wrap=True)
    for r in rows:
        if r.p20_s and r.p50_s and r.p80_s and r.bytes_per_s and r.of_ceiling:
            ms = [f"{seconds * 1e3:.2f}" for seconds in (r.p20_s, r.p50_s, r.p80_s)]
            rates = [f"{r.bytes_per_s / 1e9:.1f}", f"{100 * r.of_ceiling:.0f}", f"{r.speedup:.1f}" if r.speedup else ""]
            out.add_row(r.variant, r.backend, *ms, *rates)
    return out


def wide_console() -> Console:
    """The terminal, or 120 columns where there is none: a table in a file is of use only in full."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def run(
    chosen: Sequence[str] = (),
    *,
    full: bool = False,
    device: str = "cpu",
    budget: float = 1.0,
    compiled: bool = False,
    only: str = "",
    backends: Sequence[str] = (),
    save: Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Measure and print; returns the rows.

    only: sizes whose names hold this text, --full's too. backends: those to time (rivals have names of their own, as
    "torch"); all without one.

    Raises: BadInput for an operator without a benchmark; SystemExit(1) after naming what failed when a gate is red.
    """
    console = console or wide_console()
    unknown = set(chosen) - set(names())
    if unknown:
        raise BadInput(
            f"no benchmark for {', '.join(sorted(unknown))}", remedy=f"there are {', '.join(names())}; or: compare"
        )
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BadInput("no CUDA device can be used", remedy="fastmerge doctor says why; --device cpu needs none")
    runtime = gpu.CudaRuntime(where) if where.type == "cuda" else None
    limits, env = ceilings(where, runtime), environment(where)
    benches = [load(n) for n in chosen or names()]
    wrong = [w for b in benches for w in gate(getattr(ops, b.op), where)]
    if wrong:
        console.print("not timed: these disagree with the reference", *wrong, sep="\n  ")
        raise SystemExit(1)
    console.print(f"{env['device']}, {env['threads']} threads, torch {env['torch']}, commit {env['commit']}")
    rates = {k: f"{v / 1e9:.1f} {'GB/s' if k in ('copy', 'read', 'triad') else 'Gflop/s'}" for k, v in limits.items()}
    console.print("ceilings: " + ", ".join(f"{k} {v}" for k, v in rates.items()))
    rows = []
    for bench in benches:
        mine = [
            r
            for v in bench.variants
            if (only in v.name if only else full or v.quick)
            for r in measure(
                bench, v, where, limits, env, budget=budget, compiled=compiled, runtime=runtime, backends=backends
            )
        ]
        console.print(table(mine, bench.op))
        for name, reason in {r.backend: r.skipped for r in mine if r.skipped}.items():
            console.print(f"  {name} not run: {reason}", highlight=False)
        rows += mine
        if save is not None:
            append(save, mine)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--full", action="store_true", help="all sizes")
    parser.add_argument("--only", default="", metavar="TEXT", help="the sizes whose names hold TEXT")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="time only this: cpu, torch, ... (repeatable)"
    )
    parser.add_argument("--compile", action="store_true", help="the references under torch.compile too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per call and variant")
    parser.add_argument("--save", type=Path, help="append rows to this JSONL file")
    given = parser.parse_args()
    run(
        given.ops, full=given.full, compiled=given.compile, device=given.device, budget=given.budget, save=given.save,
        only=given.only, backends=given.backend or (),
    )  # fmt: skip


if __name__ == "__main__":
    main()

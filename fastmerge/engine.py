"""The engine: streams checkpoints through a method. :func:`run` for recipes and folders, :func:`merge` for Python.

Headers are read and everything that can be wrong is checked; the output is laid out; then every tensor goes through
fit, scan and apply (see :mod:`fastmerge.methods._method`) chunk by chunk, into its place in the output.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._dispatch import record_backends
from ._recipe_resolve import describe_parameters
from .card import output_files
from .device import Budget, Choice, Fleet, Stage
from .device.choose import parse as parse_device
from .errors import BadInput, Interrupted
from .io.checkpoint import Checkpoint, open_checkpoint
from .io.files import Files
from .io.journal import fingerprint
from .io.pipeline import Pool, opened
from .io.probe import io_seconds
from .io.writer import Layout, Writer, broken_side_links, check_target, plan_layout, side_files, work_folder
from .job import Job
from .methods import Method
from .preflight import Planned, broken_configs, raise_all
from .recipe import Recipe
from .report import Clock, Report, TensorReport, peak_rss

Progress = Callable[[int, int, str], None]
DEFAULT_SHARD = 5_000_000_000  # bytes, as Hugging Face


def _open(recipe: Recipe, method: Method, allow_pickle: bool) -> tuple[Checkpoint, Checkpoint | None, list[Checkpoint]]:
    """The template, the base the method is given (None when it takes none) and the models."""
    checkpoints: dict[str, Checkpoint] = {}
    problems: list[BadInput] = []
    for ref in [*([recipe.base_model] if recipe.base_model else []), *recipe.inputs]:
        if str(ref) not in checkpoints:
            try:
                checkpoints[str(ref)] = open_checkpoint(str(ref), allow_pickle=allow_pickle)
            except BadInput as error:
                problems.append(error)
    raise_all(problems, "the models")
    template = checkpoints[str(recipe.template)]
    raise_all(_broken_small_files(template, checkpoints.values()), "the models")
    takes_base = recipe.base_model is not None and method.base != "ignored"
    return template, template if takes_base else None, [checkpoints[str(ref)] for ref in recipe.inputs]


def _broken_small_files(template: Checkpoint, models: Iterable[Checkpoint]) -> list[BadInput]:
    """What must be refused now, not after the merge: configurations and, where they are copied, tokenizers.

    A model whose config.json is broken was not fetched or saved whole, even where nothing of it is used.
    """
    problems = broken_configs([template, *models])
    for path in side_files(template.folder).values():
        if not os.access(path, os.R_OK):
            problems.append(
                BadInput(f"{path.name} can not be read", where=str(path), remedy="change the file's permissions")
            )
    return problems


def _notes(recipe: Recipe, template: Checkpoint, out: Path | None, *, resume: bool) -> list[str]:
    """What the user may have meant otherwise."""
    notes = list(recipe.notes)
    for name in broken_side_links(template.folder):
        notes.append(f"{name} of {template.label} is a link to a file that does not exist: the output goes without it")
    if resume and out is not None and not work_folder(out).exists():
        notes.append(f"there was nothing to resume for {out}: the merge started from the beginning")
    return notes


def _layout(job: Job, max_shard_bytes: int | None) -> Layout:
    tensors = []
    for t in job.planned:
        shard = t.reference.entry.file.name if t.reference.entry is not None else None
        tensors.append((t.name, t.dtype, tuple(t.reference.shape), shard))
    if job.recipe.compiled.sliced and max_shard_bytes is None:
        max_shard_bytes = DEFAULT_SHARD  # layers move between shards: the base's split means nothing
    return plan_layout(tensors, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})


def _identity(job: Job, recipe: Recipe, layout: Layout) -> str:
    """What decides the output's bytes; a resumed job must have the same."""
    inputs = []  # in order: a recipe with two models swapped is another job
    for checkpoint in [job.template, *job.models]:
        stats = [(file, file.stat()) for file in checkpoint.files()]
        inputs.append([[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats])
    headers = {name: raw.hex() for name, raw in layout.headers.items()}
    parameters = [
        [t.name, t.plan.models, t.plan.base_source, t.plan.sources, dict(t.plan.parameters)] for t in job.planned
    ]
    return fingerprint([job.method.name, job.recipe.seed, inputs, headers, parameters])


def run(
    recipe: Recipe | str | Path,
    out: str | Path | None,
    *,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    max_memory: int | None = None,
    max_vram: int | None = None,
    max_shard_bytes: int | None = None,
    threads: int | None = None,
    nan: str = "error",
    allow_pickle: bool = False,
    ignore_extra: bool = False,
    cosines: bool = False,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Report:
    """Merge checkpoints as a recipe says and publish the result at `out`, a folder that does not exist yet.

    Args:
        recipe: a Recipe, or the path of a (mergekit-style) YAML file.
        device: "auto" | "cpu" | "cuda" | "cuda:i" | "cuda:all". auto takes the first GPU where a model of bytes and
            bandwidths says that the job is faster there; the report says which, and why.
        resume: finish an interrupted job for `out`; the bytes are those of an uninterrupted one.
        force: replace a non-empty `out`, or start an interrupted job over.
        max_memory: bytes for buffers in host memory. max_vram: bytes on each GPU; default 80 % of what is free.
        max_shard_bytes: split the output so; default: as the base is split.
        threads: workers; default: the CPUs this process may use.
        nan: what NaN or Inf in an input does: "error" | "warn" (counted in the report) | "allow" (not looked for).
        ignore_extra: leave out tensors the base does not have.
        cosines: find the lengths of the models' deltas and the cosines between them, at the cost of one more read of the
            inputs, for every method; methods that need these numbers (slerp, nuslerp, multislerp, karcher, model_stock)
            report them anyway, of the models themselves where the method knows no base.
        progress: called as progress(bytes_done, bytes_total, phase).
        dry_run: return the plan as a Report without writing; `out` may then be None.

    Raises: BadInput before anything is written for whatever headers and recipe show; BadInput for NaN found on the
        way, and Interrupted for Ctrl-C: nothing is then published, and the work folder can be resumed.
    Memory: threads x (models + 2) x chunk for element-wise and threshold methods, whatever the tensors' size; one
        tensor in float32 and its transform for whole-tensor methods.
    """
    parse_device(device)
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise BadInput(
            f"--shard-size {max_shard_bytes}: a file holds at least one byte",
            remedy="give a size such as 5GB, or leave it out to split as the base is split",
        )
    clock = Clock()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    method: Method = recipe.method
    if method.job_pass is not None:
        where = None if out is None else Path(out)
        report: Report = method.job_pass(
            recipe, where, device=device, resume=resume, force=force, max_memory=max_memory, max_vram=max_vram,
            max_shard_bytes=max_shard_bytes, threads=threads, nan=nan, allow_pickle=allow_pickle,
            ignore_extra=ignore_extra, cosines=cosines, progress=progress, dry_run=dry_run,
        )  # fmt: skip
        return report
    if method.needs_data:
        raise BadInput(
            f"{method.name} needs data, which a recipe does not carry", remedy=f"see `fastmerge methods {method.name}`"
        )
    if out is None and not dry_run:
        raise BadInput("no output folder is given", remedy="name one, or ask for a dry run")
    out = Path(out) if out is not None else None
    template, base, models = _open(recipe, method, allow_pickle)
    workers = threads or _native.threads()
    with opened(workers) as (pool, files), torch.no_grad(), record_backends() as backends:
        job = Job(
            recipe,
            method,
            template,
            base,
            models,
            pool,
            files,
            nan=nan,
            max_memory=max_memory,
            ignore_extra=ignore_extra,
            cosines=cosines,
        )
        choice = job.choose(device)
        budgets = job.budgets(choice, max_vram, max_memory)
        layout, files_beside = _layout(job, max_shard_bytes), job.plan_files()
        if out is not None:
            needed = layout.total_bytes + sum(files_beside.values())
            check_target(out, needed, force=force, resume=resume, inputs=_folders([template, *models]))
        report = Report(
            method.name, [m.label for m in models], str(recipe.base_model) if recipe.base_model else None,
            str(out) if out is not None else None,
            device=choice.name, where=choice.where(method), workers=workers, chunk_elements=job.chunk,
            notes=_notes(recipe, template, out, resume=resume),
        )  # fmt: skip
        report.estimate = _estimate(job, layout) | _device_estimate(choice, budgets)
        report.files = files_beside
        report.parameters = describe_parameters(method, [t.plan for t in job.planned if not t.copied], len(models))
        if dry_run or out is None:
            report.planned = True
            source = next((t.reference.entry.file for t in job.planned if t.reference.entry is not None), None)
            if source is not None:
                folder = out.absolute().parent if out is not None else Path.cwd()
                seconds, how = io_seconds(job.input_bytes, layout.total_bytes, source, folder)
                report.estimate |= {"seconds": seconds, "seconds_how": how}
            report.tensors = [
                TensorReport(
                    t.name,
                    t.reference.shape,
                    str(t.dtype).removeprefix("torch."),
                    "copied" if t.copied else "merged",
                    0.0,
                    0,
                    0,
                )
                for t in job.planned
            ]
            return report
        # The fit pass comes before anything is written: it may still find the recipe wrong for these tensors.
        files.tick = _ticker(job, progress)
        try:
            plan = job.fit()
            writer = Writer.start(out, layout, _identity(job, recipe, layout), resume=resume, force=force)
        except KeyboardInterrupt:
            raise Interrupted("interrupted before anything was merged", remedy="run again to start over") from None
        try:
            fleet = Fleet([Stage(*both) for both in zip(choice.devices, budgets, strict=True)], pool)
            _fill(job, writer, plan, report, fleet)
            report.files = job.write_files(writer.work)
            _finish_report(report, clock, files, writer, backends, job)
            writer.publish(_small_files(job, report), force=force)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted; nothing was published",
                where=str(work_folder(out)),
                remedy="run again with --resume to go on",
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise BadInput(
                    "the disk is full; nothing was published",
                    where=str(out.parent),
                    remedy="free some space, then --resume",
                ) from error
            raise
        finally:
            writer.close()
    return report


def _folders(checkpoints: Sequence[Checkpoint]) -> list[Path]:
    return [c.folder for c in checkpoints if c.folder is not None]


def _fill(job: Job, writer: Writer, plan: Any, report: Report, fleet: Fleet) -> None:
    finished = writer.finished
    rows: dict[str, TensorReport] = {}
    one = threading.Lock()

    def done(t: Planned, how: str, clock: Clock, read: int, wrote: int) -> None:
        if how != "resumed":
            with one:
                writer.finish(t.name)
        dtype = str(t.dtype).removeprefix("torch.")
        rows[t.name] = TensorReport(
            t.name, tuple(t.reference.shape), dtype, how, round(clock.wall(), 6), read, wrote
        )  # fmt: skip

    def merge(t: Planned) -> None:
        clock, read, wrote = Clock(), job.files.bytes_read, writer.bytes_written

        def put(offset: int, values: Tensor) -> None:
            writer.put(t.name, offset, values)

        job.apply(t, plan, put, lambda begin, end: job.pool.buffers.get("out", end - begin, t.dtype))
        done(t, "merged", clock, job.files.bytes_read - read, writer.bytes_written - wrote)

    def merge_there(t: Planned, stage: Stage, pool: Pool) -> None:
        """Results come later than apply() returns, beside other tensors': the last one finishes the tensor."""
        clock, left, lock = Clock(), t.numel, threading.Lock()

        def put(offset: int, values: Tensor) -> None:
            nonlocal left
            writer.put(t.name, offset, values)
            with lock:
                left -= values.numel()
                last = left == 0
            if last:
                done(t, "merged", clock, job.bytes_of(t), t.numel * t.dtype.itemsize)

        job.apply(t, plan, put, lambda begin, end: pool.buffers.get("out", end - begin, t.dtype), stage, pool)
        if t.numel == 0:
            done(t, "merged", clock, 0, 0)

    on_device: list[Planned] = []
    for t in job.planned:
        clock = Clock()
        if t.name in finished:
            job.skipped_bytes += job.bytes_of(t)
            done(t, "resumed", clock, 0, 0)
        elif t.copied:
            read, wrote = job.files.bytes_read, writer.bytes_written
            _copy(job, t, writer)
            done(t, "copied", clock, job.files.bytes_read - read, writer.bytes_written - wrote)
        elif fleet.stages:
            on_device.append(t)
        else:
            merge(t)
    if on_device:
        fleet.each(on_device, lambda t: t.numel, merge_there)
        for t in on_device:
            if t.name not in rows:
                writer.finish(t.name)  # says which bytes are missing
    report.tensors += [rows[t.name] for t in job.planned]
    report.device_bytes = [
        {"device": s.device.name, "up": s.bytes_up, "down": s.bytes_down} for s in fleet.stages
    ]  # fmt: skip
    for stage in fleet.stages:
        for name, need in stage.left_out.items():
            report.notes.append(f"{name} was merged on the CPU: it would take {need} bytes on {stage.device.name}")


def _copy(job: Job, t: Planned, writer: Writer) -> None:
    source, step = t.reference, job.chunk
    for begin in range(0, t.numel, step):
        end = min(begin + step, t.numel)
        writer.put(t.name, begin, source.read(begin, end, job.pool.buffers, "copy"))


def _device_estimate(choice: Choice, budgets: Sequence[Budget]) -> dict[str, Any]:
    """Why this device, and what it will hold."""
    if not choice.why:
        return {}
    held = {"vram_bytes": [b.device_bytes for b in budgets], "pinned_bytes": [b.pinned_bytes for b in budgets]}
    chunks = {"device_chunk_elements": [b.chunk for b in budgets], "device_slots": [b.slots for b in budgets]}
    return {"device_why": choice.why, "device_model": choice.model} | (held | chunks if budgets else {})


def _ticker(job: Job, progress: Progress | None) -> Callable[[], None]:
    """Called after every read; what was read stands for what is done, since every chunk read is merged and written."""
    last = 0.0

    def tick() -> None:
        nonlocal last
        if progress is not None and (now := time.monotonic()) - last > 0.1:
            last = now
            progress(min(job.files.bytes_read + job.skipped_bytes, job.read_bytes), job.read_bytes, "merge")

    return tick


def _estimate(job: Job, layout: Layout) -> dict[str, Any]:
    """Bytes a run moves and holds, from headers."""
    return {
        "tensors": len(job.planned),
        "bytes_moved": job.total_bytes,
        "bytes_out": layout.total_bytes,
        "buffer_bytes": job.memory_bytes,
    }


def _finish_report(
    report: Report, clock: Clock, files: Files, writer: Writer, backends: dict[str, str], job: Job
) -> None:
    report.wall_s, report.cpu_s, report.peak_rss = clock.wall(), clock.cpu(), peak_rss()
    report.bytes_read = files.bytes_read
    report.bytes_written = writer.bytes_written + sum(report.files.values())
    report.backends, report.nonfinite = dict(backends), dict(job.nonfinite)
    report.cosines = job.cosines.report(t.name for t in job.planned)
    if report.cosines is not None:
        rest = [t.name for t in report.tensors if t.how != "copied" and t.name not in report.cosines["tensors"]]
        if rest:
            report.notes.append(
                f"cosines leave out {len(rest)} of {len(rest) + len(report.cosines['tensors'])} tensors, {rest[0]} among"
                " them: merged by an earlier run, empty, or by a rule that needs no cosine (--cosines finds those too)"
            )


def _small_files(job: Job, report: Report) -> dict[str, bytes]:
    """Configuration, tokenizer, card and report, by file name."""
    raw = {name: path.read_bytes() for name, path in side_files(job.template.folder).items()}
    raw.update(output_files(job.recipe, job.template.config(), report))
    raw["fastmerge_report.json"] = report.to_json().encode()
    return raw

"""The engine: streams checkpoints through a method. :func:`run` for recipes and folders, :func:`merge` for Python.

Headers are read and everything that can be wrong is checked; the output is laid out; then every tensor goes through
fit, scan and apply (see :mod:`fastmerge.methods._method`) chunk by chunk, into its place in the output.
"""

from __future__ import annotations

import copy
import errno
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._dispatch import record_backends
from ._recipe_resolve import describe_parameters
from .card import output_files
from .errors import BadInput, Interrupted
from .io.checkpoint import Checkpoint, open_checkpoint
from .io.journal import fingerprint
from .io.pipeline import Files, Pool, Stream, chunk_elements, opened
from .io.probe import io_seconds
from .io.writer import Layout, Writer, check_target, plan_layout, side_files, work_folder
from .methods import Context, Method
from .preflight import Planned, check_equal, check_names, plan_tensors, raise_all
from .recipe import Recipe
from .report import Clock, Report, TensorReport, peak_rss

Progress = Callable[[int, int, str], None]
DEFAULT_SHARD = 5_000_000_000  # bytes, as Hugging Face
NAN_POLICIES = ("error", "warn", "allow")


class Job:
    """One merge: planned tensors, a method, and the passes over them. Knows nothing of where results go."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        template: Checkpoint,
        base: Checkpoint | None,
        models: Sequence[Checkpoint],
        pool: Pool,
        files: Files,
        *,
        nan: str = "error",
        max_memory: int | None = None,
        ignore_extra: bool = False,
    ) -> None:
        if nan not in NAN_POLICIES:
            raise BadInput(f"nan must be one of {', '.join(NAN_POLICIES)}, not {nan!r}")
        self.recipe, self.method, self.template, self.models = recipe, method, template, list(models)
        self.pool, self.files, self.nan = pool, files, nan
        self.nonfinite: dict[str, int] = {}
        self._lock = threading.Lock()
        self.planned: list[Planned] = []
        problems = check_names(template, models, sliced=recipe.compiled.sliced, ignore_extra=ignore_extra)
        if not problems:
            self.planned, problems = plan_tensors(recipe, template, base, models, files)
        if not problems:
            problems = [p for t in self.planned if t.copied and (p := check_equal(t)) is not None]
        raise_all(problems, "the inputs")
        merged = [t for t in self.planned if not t.copied]
        widest = max((s.dtype.itemsize for t in merged for s in [t.reference, *t.models]), default=4)
        try:
            self.chunk = chunk_elements(len(models) + 2, max(widest, 4), pool.workers, max_memory)
        except ValueError as error:
            raise BadInput(
                f"--max-memory {max_memory} is too small: {error}", remedy="allow more memory or use fewer threads"
            ) from error
        passes = 1 + (method.scan_pass is not None) + (method.fit_pass is not None)
        self.input_bytes = sum(s.nbytes for t in merged for s in [*t.models, *([t.base] if t.base else [])])
        # an upper bound: a fit pass reads nothing for parameters that need no fit
        self.read_bytes = passes * self.input_bytes
        self.total_bytes = self.read_bytes + sum(t.numel * t.dtype.itemsize for t in merged)

    def stream(
        self,
        tensor: Planned,
        put: Callable[[int, Tensor], None],
        place: Callable[[int, int], Tensor] | None = None,
        *,
        check: bool,
    ) -> Stream:
        def inspect(label: str, offset: int, chunk: Tensor) -> None:
            count = _count_nonfinite(chunk)
            if count:
                self._found_nonfinite(label, tensor.name, offset, chunk, count)

        return Stream(
            tensor.name, tensor.base, tensor.models,
            parameters=tensor.plan.parameters, out_dtype=tensor.dtype, start=tensor.start,
            seed=self.recipe.seed, chunk=self.chunk, pool=self.pool,
            put=put, place=place, inspect=inspect if check and self.nan != "allow" else None,
        )  # fmt: skip

    def _found_nonfinite(self, label: str, name: str, offset: int, chunk: Tensor, count: int) -> None:
        key = f"{label}: {name}"
        with self._lock:
            self.nonfinite[key] = self.nonfinite.get(key, 0) + count
        if self.nan == "error":
            first = offset + int((~torch.isfinite(chunk.reshape(-1))).nonzero()[0])
            raise BadInput(
                f"tensor {name!r} has NaN or Inf (first at flat index {first})",
                where=label,
                remedy="repair the model, or go on with --resume --nan warn (NaN then follows IEEE arithmetic)",
            )

    def fit(self) -> Any:
        """The method's pass over all tensors, or None."""
        if self.method.fit_pass is None:
            return None
        streams = (self.stream(t, _nowhere, check=False) for t in self.planned if not t.copied)
        return self.method.fit_pass(streams, self.recipe.seed)

    def apply(
        self, tensor: Planned, plan: Any, put: Callable[[int, Tensor], None], place: Callable[[int, int], Tensor]
    ) -> None:
        """Merge one tensor: scan it if the method asks for it, then apply chunk by chunk or whole.

        place(begin, end) gives the buffer a chunk's result may be written to; put(begin, values) stores it.
        """
        stream = self.stream(tensor, put, place, check=True)
        method, parameters = self.method, tensor.plan.parameters
        context = Context(
            name=tensor.name,
            shape=tensor.reference.shape,
            start=tensor.start,
            seed=self.recipe.seed,
            dtype=tensor.dtype,
            plan=plan,
        )
        if stream.numel == 0:
            return
        if method.scan_pass is not None:
            context.state = method.scan_pass(stream, plan)
        if method.grain == "stream":
            method.function(stream, context=context, **method.arguments(parameters))
        elif method.grain == "element":

            def visit(offset: int, base: Tensor | None, models: list[Tensor]) -> None:
                here = copy.copy(context)
                here.offset, here.out = offset, place(offset, offset + models[0].numel())
                stream.put(offset, method(base, models, here, parameters).reshape(-1))

            stream.for_each(visit)
        else:
            base, models = stream.whole()
            stream.emit(method(base, models, context, parameters))


def _nowhere(offset: int, values: Tensor) -> None:
    raise RuntimeError("a fit or scan pass can not emit results")


def _count_nonfinite(chunk: Tensor) -> int:
    if chunk.device.type == "cpu" and chunk.is_contiguous() and _native.why_not() is None:
        return int(_native.lib().count_nonfinite(chunk.data_ptr(), _native.DTYPES[chunk.dtype], chunk.numel()))
    return int((~torch.isfinite(chunk)).sum())


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
    takes_base = recipe.base_model is not None and method.base != "ignored"
    return template, template if takes_base else None, [checkpoints[str(ref)] for ref in recipe.inputs]


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
    max_shard_bytes: int | None = None,
    threads: int | None = None,
    nan: str = "error",
    allow_pickle: bool = False,
    ignore_extra: bool = False,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Report:
    """Merge checkpoints as a recipe says and publish the result at `out`, a folder that does not exist yet.

    Args:
        recipe: a Recipe, or the path of a (mergekit-style) YAML file.
        device: "auto" or "cpu".
        resume: finish an interrupted job for `out`; the bytes are those of an uninterrupted one.
        force: replace a non-empty `out`, or start an interrupted job over.
        max_memory: bytes for buffers.
        max_shard_bytes: split the output so; default: as the base is split.
        threads: workers; default: the CPUs this process may use.
        nan: what NaN or Inf in an input does: "error" | "warn" (counted in the report) | "allow" (not looked for).
        ignore_extra: leave out tensors the base does not have.
        progress: called as progress(bytes_done, bytes_total, phase).
        dry_run: return the plan as a Report without writing; `out` may then be None.

    Raises: BadInput before anything is written for whatever headers and recipe show; BadInput for NaN found on the
        way, and Interrupted for Ctrl-C: nothing is then published, and the work folder can be resumed.
    Memory: threads x (models + 2) x chunk for element-wise and threshold methods, whatever the tensors' size; one
        tensor in float32 and its transform for whole-tensor methods.
    """
    if device not in ("auto", "cpu"):
        raise BadInput(f"device {device!r} is not available", remedy="auto or cpu")
    clock = Clock()
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    method: Method = recipe.method
    if method.name in ("frank_wolfe", "frank_wolfe_soft"):  # their data is named by the recipe's parameters
        from .fw.recipes import run_recipe

        where = None if out is None else Path(out)
        return run_recipe(recipe, where, force=force, dry_run=dry_run, allow_pickle=allow_pickle)
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
        )
        layout = _layout(job, max_shard_bytes)
        if out is not None:
            check_target(out, layout.total_bytes, force=force, resume=resume, inputs=_folders([template, *models]))
        report = Report(
            method.name, [m.label for m in models], str(recipe.base_model) if recipe.base_model else None,
            str(out) if out is not None else None,
            workers=workers, chunk_elements=job.chunk, notes=list(recipe.notes),
        )  # fmt: skip
        report.estimate = _estimate(job, layout, workers)
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
        plan = job.fit()
        writer = Writer.start(out, layout, _identity(job, recipe, layout), resume=resume, force=force)
        try:
            _fill(job, writer, plan, report)
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


def _fill(job: Job, writer: Writer, plan: Any, report: Report) -> None:
    finished = writer.finished
    for t in job.planned:
        clock, read, wrote = Clock(), job.files.bytes_read, writer.bytes_written
        how = "resumed" if t.name in finished else "copied" if t.copied else "merged"
        if how == "copied":
            _copy(job, t, writer)
        elif how == "merged":

            def put(offset: int, values: Tensor, name: str = t.name) -> None:
                writer.put(name, offset, values)

            def place(begin: int, end: int, dtype: torch.dtype = t.dtype) -> Tensor:
                return job.pool.buffers.get("out", end - begin, dtype)

            job.apply(t, plan, put, place)
        if how != "resumed":
            writer.finish(t.name)
        report.tensors.append(
            TensorReport(
                t.name, tuple(t.reference.shape), str(t.dtype).removeprefix("torch."), how, round(clock.wall(), 6),
                job.files.bytes_read - read, writer.bytes_written - wrote,
            )
        )  # fmt: skip


def _copy(job: Job, t: Planned, writer: Writer) -> None:
    source, step = t.reference, job.chunk
    for begin in range(0, t.numel, step):
        end = min(begin + step, t.numel)
        writer.put(t.name, begin, source.read(begin, end, job.pool.buffers, "copy"))


def _ticker(job: Job, progress: Progress | None) -> Callable[[], None]:
    """Called after every read; what was read stands for what is done, since every chunk read is merged and written."""
    last = 0.0

    def tick() -> None:
        nonlocal last
        if progress is not None and (now := time.monotonic()) - last > 0.1:
            last = now
            progress(min(job.files.bytes_read, job.read_bytes), job.read_bytes, "merge")

    return tick


def _estimate(job: Job, layout: Layout, workers: int) -> dict[str, Any]:
    """Bytes a run moves and holds, from headers."""
    merged = [t for t in job.planned if not t.copied]
    largest = max((t.numel for t in merged), default=0)
    streams = len(job.models) + 2
    widest = max((s.dtype.itemsize for t in merged for s in [t.reference, *t.models]), default=4)
    buffers = workers * streams * widest * job.chunk
    if job.method.grain != "element":
        buffers += largest * 4 * 3
    return {
        "tensors": len(job.planned),
        "bytes_moved": job.total_bytes,
        "bytes_out": layout.total_bytes,
        "buffer_bytes": buffers,
    }


def _finish_report(
    report: Report, clock: Clock, files: Files, writer: Writer, backends: dict[str, str], job: Job
) -> None:
    report.wall_s, report.cpu_s, report.peak_rss = clock.wall(), clock.cpu(), peak_rss()
    report.bytes_read, report.bytes_written = files.bytes_read, writer.bytes_written
    report.backends, report.nonfinite = dict(backends), dict(job.nonfinite)


def _small_files(job: Job, report: Report) -> dict[str, bytes]:
    """Configuration, tokenizer, card and report, by file name."""
    raw = {name: path.read_bytes() for name, path in side_files(job.template.folder).items()}
    raw.update(output_files(job.recipe, job.template.config(), report))
    raw["fastmerge_report.json"] = report.to_json().encode()
    return raw

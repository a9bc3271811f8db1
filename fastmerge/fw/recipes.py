"""``merge_method: frank_wolfe`` and ``frank_wolfe_soft`` in a recipe: calibration data named there, folder out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _native
from ..calibration import check_records, hugging_face_gradient, parse_heads
from ..card import output_files
from ..device.choose import parse as parse_device
from ..errors import BadInput, Interrupted
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..preflight import broken_configs, raise_all
from ..report import Clock, Report, TensorReport, peak_rss
from . import hard, presets, soft
from .candidates import Candidate, open_candidate
from .inner import Inner
from .problem import Problem, opened_problem
from .save import card, check_output, save
from .trace import Iteration

if TYPE_CHECKING:
    from ..recipe import Recipe

_DATA = (
    "data", "kind", "loss", "heads", "batch", "max_length", "limit", "amp", "checkpointing", "train_mode", "reduction",
)  # fmt: skip


def run_recipe(
    recipe: Recipe,
    out: Path | None,
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
    progress: Callable[[int, int, str], None] | None = None,
    dry_run: bool = False,
) -> Report:
    """Run a Frank-Wolfe recipe and publish the result; a dry run checks everything but the model itself.

    Options are those of ``engine.run``. Refused, because they have no meaning here: resume (the iterate is in memory),
    a policy for NaN (a product with NaN chooses nothing), bounds on memory (θ, the gradient and the model are whole).
    Raises BadInput for these, for recipes with slices or per-model parameters, and as ``fm.frank_wolfe`` does: all that
    headers, parameters and calibration records show before anything is computed, everything before anything is written.
    """
    name = recipe.merge_method
    where = _refuse(name, device, resume, nan, max_memory, max_vram)
    clock = Clock()
    given = _parameters(recipe)
    base, labels = str(recipe.base_model), [str(m.model) for m in recipe.models or []]
    labels = [c for c in labels if c != base]
    data = {k: given.pop(k) for k in _DATA if k in given}
    if "heads" in data:
        data["heads"] = parse_heads(data["heads"])
    check_records(**data)
    with _threads(threads):
        template = open_checkpoint(base, allow_pickle=allow_pickle)
        candidates = [open_candidate(c, k, allow_pickle=allow_pickle) for k, c in enumerate(labels)]
        raise_all(broken_configs([template, *(c.checkpoint for c in candidates)]), "the models")
        if not ignore_extra:
            _check_extra(template, candidates)
        report = Report(name, labels, base, None if out is None else str(out), device=where, workers=_native.threads())
        report.parameters, report.notes = {**given, **data}, list(recipe.notes)
        sizes = _rehearse(name, given, template, candidates, report, allow_pickle)
        stored = None if recipe.stored_dtype is None else getattr(torch, recipe.stored_dtype)
        if dry_run:
            report.planned = True
            return report
        if out is None:
            raise BadInput("no output folder is given", remedy="name one, or ask for a dry run")
        folders = [c.folder for c in [template, *(c.checkpoint for c in candidates)] if c.folder is not None]
        check_output(template, out, force=force, inputs=folders)
        amp = torch.bfloat16 if data.pop("amp", False) else None
        ask = hugging_face_gradient(
            template.folder or base, data.pop("data"), data.pop("kind", "text"), amp=amp, device=where, **data
        )

        def told(done: int, total: int, _: Iteration) -> None:
            if progress is not None:  # each iteration reads every candidate once
                progress(done * sizes, total * sizes, "merge")

        options: dict[str, Any] = {**given, "allow_pickle": allow_pickle, "device": where, "progress": told}
        try:
            if name == "frank_wolfe_soft":
                result = soft.frank_wolfe_soft(template, candidates, ask, **options)
            else:
                result = hard.frank_wolfe(template, candidates, ask, seed=recipe.seed, **options)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted; nothing was written", remedy="run it again: a Frank-Wolfe run starts from the beginning"
            ) from None
        if stored is not None:
            floating = {n: t for n, t in result.state_dict.items() if t.is_floating_point()}
            result.state_dict.update({n: t.to(stored) for n, t in floating.items()})
        report.wall_s, report.cpu_s, report.peak_rss = clock.wall(), clock.cpu(), peak_rss()
        report.bytes_read = sizes * len(result.trace.iterations)
        report.bytes_written = sum(t.nbytes for t in result.state_dict.values())
        names = result.trace.candidates
        report.notes += [f"candidates {names[a]!r} and {names[b]!r} {hard.SAME}" for a, b in result.trace.duplicates]
        report.notes.append(f"{len(result.trace.iterations)} iterations: {result.trace.stopped}")
        files = output_files(recipe, template.config(), report)
        files["README.md"] += b"\n" + card(result, front=False).encode()
        files["fastmerge_report.json"] = report.to_json().encode()
        save(result, template, out, force=force, max_shard_bytes=max_shard_bytes, files=files)
    return report


def _refuse(name: str, device: str, resume: bool, nan: str, max_memory: int | None, max_vram: int | None) -> str:
    """The torch device to run on; raises BadInput for options that Frank-Wolfe can not keep."""
    chosen = parse_device(device)
    if chosen == "all":
        raise BadInput(
            f"{name} runs on one device", remedy="--device cuda:0, or several processes (docs/frank-wolfe.md)"
        )
    if isinstance(chosen, int) and not torch.cuda.is_available():
        raise BadInput(f"device {device!r} is not available", remedy="see `fastmerge doctor`, or --device cpu")
    if resume:
        raise BadInput(
            f"{name} can not resume: its iterate is in memory until the end", remedy="run it again without --resume"
        )
    if nan not in ("error", "warn", "allow"):
        raise BadInput(
            f"nan must be one of error, warn, allow, not {nan!r}", remedy=f"leave it out: {name} stops at NaN"
        )
    if nan != "error":
        raise BadInput(
            f"{name} can not go on with NaN: a product with it chooses nothing",
            remedy="leave --nan out, and repair or remove the candidate that is named then",
        )
    for option, size in (("--max-memory", max_memory), ("--max-vram", max_vram)):
        if size is not None:
            raise BadInput(
                f"{option} bounds buffers, but {name} holds θ, the gradient and the model whole",
                remedy="leave it out; `--dry-run` tells what is resident, and it does not grow with the candidates",
            )
    return "cpu" if isinstance(chosen, str) else f"cuda:{chosen}"


def _parameters(recipe: Recipe) -> dict[str, Any]:
    """The recipe's parameters, checked; raises BadInput for recipes of a form that has no meaning here."""
    name = recipe.merge_method
    if recipe.base_model is None:
        raise BadInput(f"{name} needs base_model", remedy="name the pretrained checkpoint the candidates come from")
    if recipe.slices is not None or recipe.modules is not None:
        raise BadInput(
            f"{name} merges whole models: slices and modules have no meaning for it",
            remedy="list the models under models: instead",
        )
    if any(m.parameters for m in recipe.models or []):
        raise BadInput(f"{name} has no per-model parameters: it finds the weights", remedy="move them to `parameters:`")
    known = recipe.method.parameters
    given: dict[str, Any] = {}
    for key, value in recipe.parameters.items():
        if key not in known:
            raise BadInput(f"{name} has no parameter {key!r}", remedy=f"it has {', '.join(known)}")
        try:
            given[key] = known[key].check(value)
        except ValueError as error:
            raise BadInput(str(error), remedy=f"change {key}: under parameters:") from None
    if "data" not in given:
        raise BadInput(f"{name} needs calibration data", remedy="add `data: calib.jsonl` to `parameters:`")
    return given


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """`count` threads for readers, kernels and the gradient."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_extra(template: Checkpoint, candidates: list[Candidate]) -> None:
    problems = []
    for c in candidates:
        extra = [] if c.deltas else [n for n in [*c.checkpoint.names(), *c.checkpoint.aliases] if n not in template]
        if extra:
            problems.append(
                BadInput(
                    f"{len(extra)} tensors are not in {template.label}, {extra[0]!r} first",
                    where=c.label,
                    remedy="--ignore-extra leaves them out",
                )
            )
    if problems:
        raise BadInput.collect(problems, "the candidates")


def _rehearse(
    name: str, given: dict[str, Any], template: Checkpoint, candidates: list[Candidate], report: Report, pickles: bool
) -> int:
    """Everything that can be wrong before the first gradient; the bytes that one iteration reads.

    Fills in the report's tensors and estimate.
    """
    method = soft.frank_wolfe_soft if name == "frank_wolfe_soft" else hard.frank_wolfe
    signature = inspect.signature(method).parameters
    options = {k: p.default for k, p in signature.items() if p.default is not p.empty}
    options |= presets.settings(presets.SOFT if name == "frank_wolfe_soft" else presets.HARD, given.get("preset"))
    options |= given
    if name == "frank_wolfe_soft":
        soft.check(**{k: options[k] for k in inspect.signature(soft.check).parameters if k != "gradient"})
        copies = 3 + options["top_k"]
    else:
        hard.check(**{k: options[k] for k in inspect.signature(hard.check).parameters})
        maker = Inner(options["inner"], None, seed=0)
        copies = 2 + (options["step"] in ("line_search", "short")) + options["pool_init"] + 2 * (not maker.linear)
    if options["init"] not in ("merge", "base"):
        open_checkpoint(options["init"], allow_pickle=pickles)
    with opened_problem(
        template, candidates, select=options["select"], exclude=options["exclude"], missing=options["missing"],
        space=None, lora="product", device=None, shards=None, group=None, allow_pickle=pickles,
    ) as problem:  # fmt: skip
        _describe(problem, report)
        elements = sum(p.numel for p in problem.parts.values())
        sizes = sum(c.checkpoint.total_bytes for c in candidates)
    report.estimate = {
        "tensors": len(report.tensors),
        "bytes_moved": sizes * options["iterations"] + template.total_bytes,
        "bytes_out": template.total_bytes,
        "buffer_bytes": 4 * elements * copies,  # θ, the gradient, and what the options above hold besides
    }
    return sizes


def _describe(problem: Problem, report: Report) -> None:
    for n in problem.base.names():
        dtype = str(problem.base.dtype(n)).removeprefix("torch.")
        how = "merged" if n in problem.parts else "copied"
        report.tensors.append(TensorReport(n, problem.base.shape(n), dtype, how, 0.0, 0, 0))

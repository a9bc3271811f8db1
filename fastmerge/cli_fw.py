"""``fastmerge fw``: Frank-Wolfe merging from the command line. ``register(app)`` adds it to the others."""

from __future__ import annotations

import enum
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from ._terminal import failing_politely, imported, say


class Kind(str, enum.Enum):
    text = "text"
    lm = "lm"
    image = "image"


def fw(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The pretrained checkpoint: folder or hub id.")],
    candidates: Annotated[list[str], typer.Argument(metavar="CANDIDATE...", help="Checkpoints or LoRA adapters.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist, or be empty.")],
    data: Annotated[Path | None, typer.Option(help="Calibration records, .jsonl or .parquet.")] = None,
    kind: Annotated[Kind | None, typer.Option(help="What a record is (docs/frank-wolfe.md). [default: text]")] = None,
    text: Annotated[bool, typer.Option("--text", help="--kind text.")] = False,
    lm: Annotated[bool, typer.Option("--lm", help="--kind lm.")] = False,
    image: Annotated[bool, typer.Option("--image", help="--kind image.")] = False,
    loss: Annotated[
        str | None, typer.Option(help="cross_entropy, causal_lm, mse or entropy (unlabelled). [default: by kind]")
    ] = None,
    gradient: Annotated[
        str | None, typer.Option(help="MODULE:FUNCTION returning a gradient callable, instead of --data.")
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(help="TASK=FOLDER: the model whose head judges a task's records (repeatable).")
    ] = None,
    soft: Annotated[bool, typer.Option("--soft", help="Several vertices per step, coefficients optimised.")] = False,
    preset: Annotated[
        str | None, typer.Option(help="robust (for pools of unknown use), published or fusion_bench.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=0)] = None,
    step: Annotated[str | None, typer.Option(help="harmonic, constant, line_search or short.")] = None,
    step_size: Annotated[float | None, typer.Option()] = None,
    scale: Annotated[float | None, typer.Option()] = None,
    inner: Annotated[str | None, typer.Option(help="Inner merge method. [default: task_arithmetic]")] = None,
    granularity: Annotated[str | None, typer.Option(help="layer or model.")] = None,
    metric: Annotated[str | None, typer.Option(help="dot, cosine or slope.")] = None,
    init: Annotated[str | None, typer.Option(help="merge, base or a checkpoint.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Vertices per soft step.")] = None,
    constraint: Annotated[str | None, typer.Option(help="Soft: simplex, capped or none.")] = None,
    inner_steps: Annotated[
        int | None, typer.Option(min=0, help="Soft: gradients per step for the coefficients.")
    ] = None,
    gap_tolerance: Annotated[float | None, typer.Option(help="Stop when the duality gap is at most this.")] = None,
    select: Annotated[list[str] | None, typer.Option(help="Merge only tensors that match (repeatable).")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Keep the base's tensors that match (repeatable).")] = None,
    missing: Annotated[str | None, typer.Option(help="error, or zero: a missing tensor is the zero vertex.")] = None,
    lora: Annotated[
        str | None, typer.Option(help="product: adapters as what they do, B·A; factors: A and B apart.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Records per forward pass.")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per record.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many records.")] = None,
    train_mode: Annotated[
        bool, typer.Option("--train-mode", help="With dropout noise, as the published code differentiates.")
    ] = False,
    reduction: Annotated[
        str | None, typer.Option(help="mean, or sum (published) of the records' losses. [default: mean]")
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16 autocast.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute blocks in the backward pass.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Where the model and the merged weights live. [default: cpu]")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the trace to this .png or .svg.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the trace as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Merge any number of candidates by Frank-Wolfe on calibration data (FW-Merging, arXiv:2503.12649)."""
    given = dict(locals())
    with failing_politely(debug=debug, json=json):
        import torch

        from .errors import BadInput
        from .fw import frank_wolfe, frank_wolfe_soft
        from .fw.hard import SAME
        from .fw.save import check_output, save
        from .io.checkpoint import open_checkpoint

        if (data is None) == (gradient is None):
            raise BadInput("give either --data (with --kind) or --gradient", remedy="see `fastmerge fw --help`")
        kinds = {k for k in ("text", "lm", "image") if given[k]} | ({kind.value} if kind else set())
        if len(kinds) > 1:
            raise BadInput(f"records are of one kind, not {' and '.join(sorted(kinds))}", remedy="give one of them")
        of_data = ("loss", "head", "limit", "reduction", "train_mode", "amp", "checkpointing")
        for name in of_data if gradient is not None else ():
            if given[name]:
                raise BadInput(
                    f"--{name.replace('_', '-')} is for --data; a --gradient is used as it is", remedy="leave it out"
                )
        common = (
            "preset",
            "iterations",
            "granularity",
            "metric",
            "init",
            "gap_tolerance",
            "select",
            "exclude",
            "missing",
            "scale",
            "lora",
        )
        own = ("top_k", "constraint", "inner_steps") if soft else ("step", "step_size", "inner")
        other = ("step", "step_size", "inner") if soft else ("top_k", "constraint", "inner_steps")
        for name in other:
            if given[name] is not None:
                raise BadInput(
                    f"--{name.replace('_', '-')} is an option of {'hard' if soft else 'soft'} Frank-Wolfe",
                    remedy="leave --soft out" if soft else "add --soft",
                )
        options: dict[str, Any] = {k: given[k] for k in (*common, *own) if given[k] is not None}
        template = open_checkpoint(base)
        check_output(template, out, force=force, inputs=[Path(p) for p in (base, *candidates) if Path(p).is_dir()])
        if gradient is not None:
            ask = imported(gradient, "--gradient")
        else:
            from .calibration import hugging_face_gradient, parse_heads

            assert data is not None
            ask = hugging_face_gradient(
                template.folder or base, data, next(iter(kinds), "text"), loss=loss, heads=parse_heads(head), batch=batch,
                max_length=max_length, limit=limit, device=device, amp=torch.bfloat16 if amp else None,
                checkpointing=checkpointing, train_mode=train_mode, reduction=reduction or "mean",
            )  # fmt: skip

        def progress(done: int, total: int, it: Any) -> None:
            if not quiet:
                shown = "" if it.loss is None else f"loss {it.loss:.4f} · "
                say(f"step {done}/{total} · {shown}gap {it.gap:.4g} · {sum(it.seconds.values()):.1f} s")

        method = frank_wolfe_soft if soft else frank_wolfe
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=f".*{SAME}")  # told below, in a line of its own
            result = method(template, candidates, ask, device=device, progress=progress, **options)
        names = result.trace.candidates
        for a, b in result.trace.duplicates:
            say(f"warning: candidates {names[a]!r} and {names[b]!r} {SAME}")
        save(result, base, out, force=force)
        if plot is not None:
            result.trace.plot(plot)
        if json:
            print(result.trace.to_json())
        elif not quiet:
            say(f"{result.trace.stopped}; written to {out}")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(fw)

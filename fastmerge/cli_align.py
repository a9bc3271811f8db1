"""The commands ``fastmerge align`` and ``fastmerge apply``; :func:`register` adds them to an application."""

from __future__ import annotations

import json as json_
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._terminal import failing_politely, imported, say

if TYPE_CHECKING:
    from torch import Tensor

    from .io.checkpoint import Checkpoint


def _read(reference: str) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A checkpoint and all its tensors."""
    from . import merging
    from .io.checkpoint import open_checkpoint

    return open_checkpoint(reference), merging.merge("linear", None, [reference], weight=1.0)


def _write(out: Path, template: Checkpoint, source: str, state: dict[str, Tensor]) -> None:
    """Publishes tensors as a checkpoint split and named like the template, its small files beside them."""
    from .io.writer import Writer, check_target, plan_layout, side_files

    tensors = [(n, state[n].dtype, tuple(state[n].shape), template.shard_of(n)) for n in template.names()]
    layout = plan_layout(tensors, max_shard_bytes=None, metadata={"format": "pt"})
    check_target(out, layout.total_bytes, force=False, resume=False)
    writer = Writer.start(out, layout, f"apply {source}", resume=False, force=False)
    try:
        for name in template.names():
            writer.put(name, 0, state[name].reshape(-1))
            writer.finish(name)
        folder = Path(source) if Path(source).is_dir() else None
        writer.publish({n: p.read_bytes() for n, p in side_files(folder).items()}, force=False)
    finally:
        writer.close()


def _options(checkpoint: Checkpoint, heads: int | None, kv_heads: int | None) -> dict[str, Any]:
    from .structure.naming import heads_in_config

    given = {"heads": heads, "kv_heads": kv_heads}
    return {**heads_in_config(checkpoint.config()), **{k: v for k, v in given.items() if v is not None}}


def _check_plot(plot: Path | None, data: Path | None, loss: str | None) -> None:
    from .errors import BadInput

    if plot is None and (data is not None or loss is not None):
        raise BadInput("--data and --loss are for the picture of the loss", remedy="add --plot FILE")
    if data is not None and loss is not None:
        raise BadInput("both --data and --loss are given", remedy="give either --data (with --kind) or --loss")


def _loss(
    loss: str | None, data: Path | None, kind: str, limit: int | None, folder: str
) -> Callable[[dict[str, Tensor]], float] | None:
    """What tells the loss of a state dict: the user's function, or a transformers model on records."""
    if loss is not None:
        made: Callable[[dict[str, Tensor]], float] = imported(loss, "--loss")
        return made
    if data is None:
        return None
    from .calibration import hugging_face_gradient

    return hugging_face_gradient(folder, data, kind, limit=limit).loss


def align(
    models: Annotated[list[str], typer.Argument(help="Checkpoints; the first one is the frame of the others.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the permutations (.npz).")],
    spec: Annotated[str | None, typer.Option(help="Architecture; recognised by tensor names when absent.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; read from config.json when absent.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads (grouped queries).")] = None,
    similarity: Annotated[str, typer.Option(help="pearson, cosine or dot.")] = "pearson",
    order: Annotated[str, typer.Option(help="Order of the sweeps: topological or random.")] = "topological",
    sweeps: Annotated[int, typer.Option(min=1, help="At most so many sweeps.")] = 100,
    seed: Annotated[int, typer.Option()] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the trace, similarity blocks and, given --data or --loss, the loss between the networks."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Records for the loss, .jsonl or .parquet (as `fastmerge fw --data`).")
    ] = None,
    kind: Annotated[str, typer.Option(help="What a record is: text, lm or image.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many records.")] = None,
    loss: Annotated[
        str | None,
        typer.Option(help="MODULE:FUNCTION returning a callable of a state dict (its loss), instead of --data."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Find the permutations that bring networks into the frame of the first one, from their weights."""
    with failing_politely(debug=debug, json=json):
        from .structure import align as run
        from .structure import named_spec

        _check_plot(plot, data, loss)
        judge = _loss(loss, data, kind, limit, models[0])
        loaded = [_read(m) for m in models]
        states = [s for _, s in loaded]
        found = run(
            states,
            named_spec(spec, states[0], **_options(loaded[0][0], heads, kv_heads)),
            similarity=similarity,  # type: ignore[arg-type]
            order=order,  # type: ignore[arg-type]
            sweeps=sweeps,
            seed=seed,
        )
        found.save(out)
        if plot is not None:
            from .structure.plotting import plot as draw

            draw(found, plot, states=states, loss=judge)
        if json:
            rows = [{"model": m, "sweeps": [vars(s) for s in t]} for m, t in zip(models, found.trace, strict=True)]
            print(json_.dumps({"out": str(out), "objective": found.objective, "models": rows}))
        else:
            for m, t in zip(models[1:], found.trace[1:], strict=True):
                best = max(s.objective for s in t if s.accepted)
                say(f"{m}: mean matched similarity {best:.4f} after {len(t)} sweeps")
            say(f"permutations: {out}")


def apply(
    model: Annotated[str, typer.Argument(help="The checkpoint to permute.")],
    permutations: Annotated[Path, typer.Argument(help="What `fastmerge align` wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder for the permuted checkpoint; must not exist.")],
    index: Annotated[int, typer.Option(help="Which of the aligned models it is (0 = the anchor).")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Apply saved permutations to a checkpoint: same function, units in the anchor's order."""
    with failing_politely(debug=debug, json=json):
        from .errors import BadInput
        from .structure import Alignment

        found = Alignment.load(permutations)
        if not 0 <= index < len(found.perms):
            raise BadInput(
                f"there is no model {index} in the file",
                where=str(permutations),
                remedy=f"give --index from 0 to {len(found.perms) - 1}",
            )
        checkpoint, state = _read(model)
        moved = found.spec.permute_state(state, found.perms[index])
        _write(out, checkpoint, model, moved)
        if json:
            print(json_.dumps({"out": str(out), "tensors": len(moved)}))
        else:
            say(f"{len(moved)} tensors: {out}")


def register(app: typer.Typer) -> None:
    """Adds both commands to a typer application."""
    app.command()(align)
    app.command()(apply)

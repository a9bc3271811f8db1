"""A Frank-Wolfe result as a checkpoint folder: the base's shards and side files, a card and the trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import BadInput
from ..io.checkpoint import Checkpoint, open_checkpoint
from ..io.journal import fingerprint
from ..io.writer import Writer, check_target, plan_layout, side_files
from .result import FrankWolfeResult

TRACE = "frank_wolfe_trace.json"


def check_output(base: Checkpoint, out: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse, before any work, an output that is in use or one of the inputs, or a disk without room."""
    check_target(out, base.total_bytes, force=force, resume=False, inputs=inputs)


def save(
    result: FrankWolfeResult,
    base: str | Path | Checkpoint,
    out: str | Path,
    *,
    force: bool = False,
    max_shard_bytes: int | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the merged weights to `out` as the base is split, with its configuration and tokenizer, and the trace.

    `max_shard_bytes` splits them so instead; `files` replace or add to the small files. Nothing is published before
    everything is written. Raises BadInput for an output that is not empty (unless `force`) or a disk without room.
    """
    out, template = Path(out), base if isinstance(base, Checkpoint) else open_checkpoint(base)
    check_output(template, out, force=force)
    state = result.state_dict
    missing = [n for n in template.names() if n not in state]
    if missing:
        raise BadInput(f"the result lacks {missing[0]!r} of the base", where=str(base), remedy="is this its base?")
    tensors = [(n, state[n].dtype, tuple(state[n].shape), template.shard_of(n)) for n in template.names()]
    layout = plan_layout(tensors, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})
    writer = Writer.start(out, layout, fingerprint([result.trace.settings]), resume=False, force=True)
    try:
        for name, *_ in tensors:
            flat = state[name].detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                writer.put(name, 0, flat)
            writer.finish(name)
        small = {name: path.read_bytes() for name, path in side_files(template.folder).items()}
        small["README.md"] = card(result).encode()
        small |= files or {}
        small[TRACE] = (result.trace.to_json() + "\n").encode()
        writer.publish(small, force=force)
    finally:
        writer.close()
    return out


def card(result: FrankWolfeResult, *, front: bool = True) -> str:
    """A model card with the settings and what was chosen; with front=False a section for one."""
    trace = result.trace
    lines = ["---", "library_name: transformers", "tags: [merge, fastmerge]", "---", "", "# Frank-Wolfe merge", ""]
    lines = lines if front else ["## Frank-Wolfe merge", ""]
    lines += [f"Base: `{trace.settings['base']}`. Method: FW-Merging (arXiv:2503.12649), by fastmerge.", ""]
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| {k} | `{v}` |" for k, v in trace.settings.items() if k not in ("base", "method")]
    lines += ["", "| candidate | share of the steps |", "|---|---|"]
    shares = trace.shares()
    for k, label in enumerate([*trace.candidates, "zero vertex"]):
        share = sum(row[k] for row in shares) / max(len(shares), 1)
        lines.append(f"| `{Path(label).name}` | {share:.1%} |")
    lines += ["", f"{len(trace.iterations)} iterations; {trace.stopped}. Every step is in `{TRACE}`.", ""]
    return "\n".join(lines)

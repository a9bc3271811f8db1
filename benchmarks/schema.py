"""The rows that ``fastmerge bench --save`` writes and ``fastmerge bench compare`` reads; docs/benchmarks.md explains them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fastmerge.errors import BadInput

SCHEMA = 2


class Row(BaseModel):
    """One call of one operator on one machine, or the reason why it was not timed. SI units."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = SCHEMA
    op: str
    variant: str
    backend: str  # reference, cpu, triton, cuda, cupy, torch.compile, or what a user would run instead
    skipped: str | None = None  # why it was not timed; then there are no times
    timing: str | None = None  # clock, events (cold L2 cache) or graph (rotated inputs)
    p20_s: float | None = None
    p50_s: float | None = None
    p80_s: float | None = None
    calls: int | None = None
    bytes: int | None = None  # least traffic: every input once, every output once
    flops: float | None = None
    bytes_per_s: float | None = None
    flops_per_s: float | None = None
    bound: Literal["memory", "compute"] | None = None  # which ceiling is the nearer one
    of_ceiling: float | None = None  # max(bytes / copy or read, flops / gemm) over the median time
    speedup: float | None = None  # median of the reference over this one's, same run; None where it was left out
    ceilings: dict[str, float]  # bytes/s of copy, read, triad; flop/s of gemm, rfft2
    device: str
    driver: str | None
    threads: int
    fastmerge: str
    torch: str
    triton: str | None
    cupy: str | None
    python: str
    system: str
    commit: str | None
    date: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.variant, self.backend


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a JSONL file."""
    with path.open("a") as f:
        f.writelines(row.model_dump_json() + "\n" for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a file; of rows with the same operator, variant and backend the last one counts.

    Raises: BadInput naming file and line.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}", remedy="write it with: fastmerge bench --save FILE") from error
    rows: dict[tuple[str, str, str], Row] = {}
    for i, line in enumerate(lines, 1):
        try:
            data: Any = json.loads(line)
            row = Row.model_validate(data)
        except (ValueError, ValidationError) as error:
            raise BadInput(
                f"{path}, line {i} is not a row of schema {SCHEMA}: {str(error).splitlines()[0]}",
                remedy="measure again with this version: fastmerge bench --save FILE",
            ) from error
        rows[row.key] = row
    if not rows:
        raise BadInput(f"{path} holds no rows", remedy="write it with: fastmerge bench --save FILE")
    return list(rows.values())

"""Everything that can be found wrong from headers alone, found before the first byte is written, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import BadInput
from .io.checkpoint import Checkpoint
from .io.pipeline import Files, Source

if TYPE_CHECKING:
    from .recipe import TensorPlan

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST_PROBLEMS = 20


@dataclass
class Planned:
    """One output tensor: its inputs, its dtype, and whether it is merged or copied."""

    plan: TensorPlan
    base: Source | None  # what the method is given as base
    models: list[Source]
    reference: Source  # decides shape and default dtype
    dtype: torch.dtype
    start: int  # flat index among merged elements; of no meaning for copied tensors
    copied: bool

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def numel(self) -> int:
        n = 1
        for d in self.reference.shape:
            n *= d
        return n


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def check_names(base: Checkpoint, models: Sequence[Checkpoint], *, sliced: bool, ignore_extra: bool) -> list[BadInput]:
    """Tensors that some model lacks or has in excess of the base."""
    problems = []
    wanted = [*base.names(), *base.aliases]
    for model in models:
        if model is base:
            continue
        missing = [n for n in wanted if n not in model] if not sliced else []
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            problems.append(
                BadInput(
                    f"{len(missing)} tensors of {base.label} are missing: {', '.join(missing[:3])}{more}",
                    where=model.label,
                    remedy="merge models of one architecture, saved the same way (adapters must be folded in first)",
                )
            )
        extra = [n for n in [*model.names(), *model.aliases] if n not in base]
        if extra and not sliced and not ignore_extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            problems.append(
                BadInput(
                    f"{len(extra)} tensors are not in {base.label}: {', '.join(extra[:3])}{more}",
                    where=model.label,
                    remedy="--ignore-extra leaves them out (right for a tied lm_head that was written twice)",
                )
            )
    return problems


def plan_tensors(
    plans: Sequence[TensorPlan],
    base: Checkpoint,
    models: Sequence[Checkpoint],
    files: Files,
    *,
    give_base: bool,
    dtype: torch.dtype | None,
) -> tuple[list[Planned], list[BadInput]]:
    """Sources and output dtype of every tensor, and every mismatch of shape or kind."""
    problems: list[BadInput] = []
    out: list[Planned] = []
    start = 0
    for plan in plans:
        if plan.base_source not in base:
            problems.append(BadInput(f"tensor {plan.base_source!r} is missing", where=base.label))
            continue
        reference = Source(base, plan.base_source, files)
        lacking = [m.label for m, n in zip(models, plan.sources, strict=True) if n not in m]
        if lacking:
            problems.append(BadInput(f"tensor {plan.name!r} is missing", where=", ".join(lacking)))
            continue
        sources = [Source(m, n, files) for m, n in zip(models, plan.sources, strict=True)]
        for source in sources:
            if source.shape != reference.shape:
                problems.append(
                    BadInput(
                        f"tensor {source.name!r} has shape {_shape(source.shape)}, {base.label} has {_shape(reference.shape)}",
                        where=source.checkpoint.label,
                        remedy="the models differ in architecture or vocabulary: resize them to one shape first",
                    )
                )
            elif (source.dtype in FLOATS) != (reference.dtype in FLOATS):
                problems.append(
                    BadInput(
                        f"tensor {source.name!r} has dtype {source.dtype}, {base.label} has {reference.dtype}",
                        where=source.checkpoint.label,
                        remedy="convert the tensor to one kind of dtype in all models",
                    )
                )
        copied = reference.dtype not in FLOATS
        planned = Planned(
            plan,
            reference if give_base else None,
            sources,
            reference,
            reference.dtype if copied or dtype is None else dtype,
            start,
            copied,
        )
        out.append(planned)
        if not copied:
            start += planned.numel
    return out, problems


def check_equal(planned: Planned) -> BadInput | None:
    """Integer, bool and float8 tensors are not arithmetic: they must be equal in all models, and are copied."""
    step = 1 << 22
    for begin in range(0, max(planned.numel, 1), step):
        end = min(begin + step, planned.numel)
        want = _bytes(planned.reference, begin, end)
        for source in planned.models:
            if source.dtype != planned.reference.dtype or not torch.equal(_bytes(source, begin, end), want):
                return BadInput(
                    f"tensor {planned.name!r} ({planned.reference.dtype}) differs from {planned.reference.checkpoint.label}'s and can not be averaged",
                    where=source.checkpoint.label,
                    remedy="make this integer buffer equal in all models, or convert a quantised model to floating point",
                )
    return None


def _bytes(source: Source, begin: int, end: int) -> torch.Tensor:
    if source.tensor is not None:
        return source.tensor.reshape(-1)[begin:end].contiguous().view(torch.uint8)
    assert source.entry is not None
    into = torch.empty(end - begin, dtype=source.dtype)
    source.files.load(source.entry, begin, end, into)
    return into.view(torch.uint8)


def raise_all(problems: list[BadInput], what: str) -> None:
    """Raise one error that lists the problems (the first MOST_PROBLEMS of them), if there are any."""
    if not problems:
        return
    shown = problems[:MOST_PROBLEMS]
    if len(problems) > MOST_PROBLEMS:
        shown.append(BadInput(f"... and {len(problems) - MOST_PROBLEMS} more"))
    raise BadInput.collect(shown, what)

"""Everything that can be found wrong from headers alone, found before the first byte is written, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import BadInput
from .io.checkpoint import Checkpoint
from .io.files import Files
from .io.pipeline import Source

if TYPE_CHECKING:
    from .recipe import Recipe, TensorPlan

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
    start: int  # flat index among all merged elements, tensors in the order of their names
    copied: bool

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def input_bytes(self) -> int:
        """Of base and models."""
        return sum(s.nbytes for s in [*self.models, *([self.base] if self.base else [])])

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
        for alias, name in base.aliases.items():
            if alias in model.resident and name in model and not torch.equal(model.resident[alias], _held(model, name)):
                problems.append(
                    BadInput(
                        f"tensor {alias!r} is tied to {name!r} in {base.label}, but has values of its own here",
                        where=model.label,
                        remedy="untie it in the base (save a copy), or tie it in this model",
                    )
                )
        extra = [n for n in [*model.names(), *model.aliases] if n not in base]
        if extra and not sliced and not ignore_extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            problems.append(
                BadInput(
                    f"{len(extra)} tensors are not in {base.label}: {', '.join(extra[:3])}{more}",
                    where=model.label,
                    remedy="--ignore-extra (ignore_extra=True) leaves them out (right for a tied lm_head that was written twice)",
                )
            )
    return problems


def _held(model: Checkpoint, name: str) -> torch.Tensor:
    return model.resident[model.aliases.get(name, name)]


def broken_configs(models: Iterable[Checkpoint]) -> list[BadInput]:
    """One error for every config.json of the models that is there and can not be read as a JSON object."""
    problems: dict[str, BadInput] = {}
    for model in models:
        try:
            model.config()
        except BadInput as error:
            problems[str(error)] = error  # models that are files of one folder share its config.json
    return list(problems.values())


def plan_tensors(
    recipe: Recipe, template: Checkpoint, base: Checkpoint | None, models: Sequence[Checkpoint], files: Files
) -> tuple[list[Planned], list[BadInput]]:
    """Sources and output dtype of every tensor, and every mismatch of shape or kind.

    The template decides names, shapes and dtypes (the base, else the first model); the base is what the method is
    given, None when it takes none; models are in the order of ``recipe.inputs``.
    """
    problems: list[BadInput] = []
    out: list[Planned] = []
    others = {ref: m.names() for ref, m in zip(recipe.inputs, models, strict=True)}
    dtype = getattr(torch, recipe.stored_dtype) if recipe.stored_dtype else None
    for plan in recipe.resolve(template.names(), others):
        taking_part = [models[i] for i in plan.models]
        wanted = [(base, plan.base_source)] if base is not None and plan.base_source is not None else []
        wanted += list(zip(taking_part, plan.sources, strict=True))
        lacking = [_lacks(m, name) for m, name in wanted if name not in m]
        if lacking:
            problems += lacking
            continue
        inputs = [Source(m, name, files) for m, name in wanted]
        reference = (
            inputs[0]
            if plan.base_source is not None or plan.name not in template
            else Source(template, plan.name, files)
        )
        problems += [p for source in inputs if (p := _mismatch(source, reference)) is not None]
        copied = reference.dtype not in FLOATS
        planned = Planned(
            plan,
            inputs[0] if plan.base_source is not None else None,
            inputs[1:] if plan.base_source is not None else inputs,
            reference,
            reference.dtype if copied or dtype is None else dtype,
            0,
            copied,
        )
        out.append(planned)
    # By name, so that selections over the whole model do not depend on how checkpoints are laid out.
    start = 0
    for planned in sorted((t for t in out if not t.copied), key=lambda t: t.name):
        planned.start = start
        start += planned.numel
    return out, problems


def _lacks(model: Checkpoint, name: str) -> BadInput:
    return BadInput(
        f"tensor {name!r} is missing",
        where=model.label,
        remedy="merge models of one architecture, saved the same way; in slices, layers that have the same tensors",
    )


def _mismatch(source: Source, reference: Source) -> BadInput | None:
    what = reference.checkpoint.label
    if source.shape != reference.shape:
        return BadInput(
            f"tensor {source.name!r} has shape {_shape(source.shape)}, {what} has {_shape(reference.shape)}",
            where=source.checkpoint.label,
            remedy="the models differ in architecture or vocabulary: resize them to one shape first",
        )
    if (source.dtype in FLOATS) != (reference.dtype in FLOATS):
        return BadInput(
            f"tensor {source.name!r} has dtype {source.dtype}, {what} has {reference.dtype}",
            where=source.checkpoint.label,
            remedy="convert the tensor to one kind of dtype in all models",
        )
    return None


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
    into = torch.empty(end - begin, dtype=source.dtype, device="cpu")
    source.files.load([(source.entry, begin, end, into)])
    return into.view(torch.uint8)


def raise_all(problems: list[BadInput], what: str) -> None:
    """Raise one error that lists the problems (the first MOST_PROBLEMS of them), if there are any."""
    if not problems:
        return
    shown = problems[:MOST_PROBLEMS]
    if len(problems) > MOST_PROBLEMS:
        shown.append(BadInput(f"... and {len(problems) - MOST_PROBLEMS} more"))
    raise BadInput.collect(shown, what)

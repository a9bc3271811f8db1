"""``merge_method: frank_wolfe`` and ``frank_wolfe_soft`` in a recipe: calibration data named there, folder out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _native
from ..calibration import hugging_face_gradient
from ..errors import BadInput
from ..io.checkpoint import open_checkpoint
from ..report import Report, peak_rss
from .hard import frank_wolfe
from .save import check_output, save
from .soft import frank_wolfe_soft

if TYPE_CHECKING:
    from ..recipe import Recipe

_DATA = ("data", "kind", "loss", "batch", "max_length", "limit")


def run_recipe(recipe: Recipe, out: Path | None, *, force: bool, dry_run: bool, allow_pickle: bool) -> Report:
    """Run a Frank-Wolfe recipe and publish the result; a dry run checks headers and data and writes nothing.

    Raises BadInput for recipes with slices or per-model parameters, and as ``fm.frank_wolfe`` does.
    """
    name = recipe.merge_method
    if recipe.base_model is None:
        raise BadInput(f"{name} needs base_model", remedy="name the pretrained checkpoint the candidates come from")
    if recipe.slices is not None or recipe.modules is not None:
        raise BadInput(f"{name} merges whole models: slices and modules have no meaning for it")
    if any(m.parameters for m in recipe.models or []):
        raise BadInput(f"{name} has no per-model parameters: it finds the weights", remedy="move them to `parameters:`")
    base, candidates = str(recipe.base_model), [str(m.model) for m in recipe.models or []]
    candidates = [c for c in candidates if c != base]
    known = recipe.method.parameters
    given: dict[str, Any] = {}
    for key, value in recipe.parameters.items():
        if key not in known:
            raise BadInput(f"{name} has no parameter {key!r}", remedy=f"it has {', '.join(known)}")
        try:
            given[key] = known[key].check(value)
        except ValueError as error:
            raise BadInput(str(error)) from None
    if "data" not in given:
        raise BadInput(f"{name} needs calibration data", remedy="add `data: calib.jsonl` to `parameters:`")
    begin = time.perf_counter()
    template = open_checkpoint(base, allow_pickle=allow_pickle)
    report = Report(name, candidates, base, None if out is None else str(out), workers=_native.threads())
    report.parameters = dict(given)
    if dry_run:
        report.planned = True
        return report
    if out is None:
        raise BadInput("no output folder is given", remedy="name one, or ask for a dry run")
    check_output(template, out, force=force)
    ask = hugging_face_gradient(
        template.folder or base, given.pop("data"), given.pop("kind", "text"),
        **{k: given.pop(k) for k in _DATA if k in given},
    )  # fmt: skip
    options: dict[str, Any] = {**given, "allow_pickle": allow_pickle}
    if name == "frank_wolfe_soft":
        result = frank_wolfe_soft(template, candidates, ask, **options)
    else:
        result = frank_wolfe(template, candidates, ask, seed=recipe.seed, **options)
    save(result, base, out, force=force)
    report.wall_s, report.peak_rss = time.perf_counter() - begin, peak_rss()
    report.notes.append(f"{len(result.trace.iterations)} iterations: {result.trace.stopped}")
    return report

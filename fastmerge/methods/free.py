from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import BadInput
from ._method import Context, Density, Header, Help, PerModel, Range, TensorStream, method
from .fr import fr

FOLDER = "experts"


@method(paper="arXiv:2411.16815", grain="stream")
def free(
    tensor: TensorStream,
    *,
    density: Annotated[PerModel[Density], Help("share of its task vector an expert keeps, in (0, 1]")] = 0.01,
    trim: Annotated[
        Literal["topk", "window", "random", "rank_random"],
        Help("entries kept: the largest; those after the gamma largest; at random; at random by rank"),
    ] = "topk",
    gamma: Annotated[PerModel[Density], Help("window: share of the largest entries left out")] = 0.01,
    epsilon: Annotated[float, Range(0.0, 1.0), Help("rank_random: half the spread of the probabilities")] = 0.005,
    by: Annotated[Literal["row", "tensor"], Help("density of every row, or of every tensor")] = "row",
    mu: Annotated[
        Literal["paper", "balanced", "vit", "constant"], Help("strength of an expert: see docs/free.md")
    ] = "paper",
    constant: Annotated[float, Range(0.0), Help("mu: constant")] = 7.0,
    combine: Annotated[
        Literal["add", "override"], Help("noted in the experts: added to the backbone, or put over it")
    ] = "add",
    experts: Annotated[str, Help("regular expression found in the names that get entries (default: all)")] = "",
    tasks: Annotated[list[str] | None, Help("names of the experts (default: the models' folders)")] = None,
    context: Context,
    **backbone: Any,
) -> None:
    """FREE-Merging: the backbone of `fr`, and experts/TASK.safetensors, what each model adds to it.

    The merged weights are θ0 + Σ λᵢ·G(vᵢ), as `fr` with the same keys gives them. Expert i is μᵢ·M(vᵢ, d): the `density`
    share of the task vector's entries, scaled. A router, or the task's name, picks one when the model is served
    (fastmerge.experts.FreeModel).
    """
    fr.function(tensor, context=context, **backbone)


free.parameters = {**free.parameters, **fr.parameters}  # the backbone's keys are fr's, and so are its passes
free.fit_pass, free.scan_pass = fr.fit_pass, fr.scan_pass
free.check_pass, free.memory_pass = fr.check_pass, fr.memory_pass


@free.plan_files
def _plan(tensors: Sequence[Header], models: Sequence[str]) -> dict[str, int]:
    from ..experts.collect import check_parameters

    names = _tasks([t.parameters for t in tensors], models)
    sizes = [500.0 + 250 * len(tensors)] * len(names)  # headers
    for t in tensors:
        check_parameters(t.parameters)
        if t.models != tuple(range(len(models))):
            raise BadInput(
                f"tensor {t.name!r} does not merge all {len(models)} models in their order",
                remedy="free needs every model everywhere: list them under models:, without slices",
            )
        numel = 1
        for n in t.shape:
            numel *= n
        for i, density in enumerate(t.parameters["density"]):
            # Positions: a byte an entry down to about 1 %, at most a bit an element.
            sizes[i] += numel * min(density * (t.dtype.itemsize + 1.2), density * t.dtype.itemsize + 0.125)
    return {f"{FOLDER}/{name}.safetensors": int(size) for name, size in zip(names, sizes, strict=True)}


@free.write_files
def _write(tensors: Iterable[TensorStream], models: Sequence[str], folder: Path) -> dict[str, int]:
    from ..experts.collect import Collection
    from ..experts.storage import save

    collection: Collection | None = None
    for tensor in tensors:
        collection = collection or Collection(_tasks([tensor.parameters], models))
        collection.add(tensor)
    made = collection.experts() if collection is not None else []
    return {(name := f"{FOLDER}/{e.task}.safetensors"): save(e, folder / name) for e in made}


def _tasks(parameters: Sequence[Any], models: Sequence[str]) -> list[str]:
    from ..experts.collect import task_names

    given = parameters[0]["tasks"] if parameters else None
    if any(p["tasks"] != given for p in parameters):
        raise BadInput("tasks differ between tensors", remedy="give one list, without filters")
    return task_names(given, models)

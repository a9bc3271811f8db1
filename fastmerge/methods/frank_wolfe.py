from __future__ import annotations

from typing import Annotated, Any, Literal

from ..errors import BadInput
from ._method import Help, Models, Range, Weight, method

Data = Annotated[str, Help("Calibration records, .jsonl or .parquet; a relative path starts from the current folder.")]
Kind = Annotated[Literal["text", "lm", "image"], Help("What a record is (docs/frank-wolfe.md).")]
Loss = Annotated[str | None, Help("cross_entropy, causal_lm, mse or entropy; by kind when left out.")]
Preset = Annotated[str | None, Help("robust, published or fusion_bench: what other keys default to.")]
Names = Annotated[list[str] | None, Help("Regular expressions of tensor names.")]
Heads = Annotated[list[str] | None, Help("TASK=FOLDER: the model whose head judges a task's records.")]
Count = Annotated[int, Range(0)]


def _whole(name: str) -> BadInput:
    return BadInput(
        f"{name} moves the whole model through several iterations and can not be applied to one tensor",
        remedy=f"use a recipe with an output folder, fm.{name}, or `fastmerge fw`",
    )


@method(paper="arXiv:2503.12649", needs_data=True)
def frank_wolfe(
    base: Weight,
    models: Models,
    *,
    data: Data,
    kind: Kind = "text",
    loss: Loss = None,
    preset: Preset = None,
    iterations: Count = 10,
    step: Literal["harmonic", "constant", "line_search", "short"] = "harmonic",
    step_size: Annotated[float, Range(0.0)] = 0.1,
    scale: Annotated[float, Range(0.0)] = 0.29,
    inner: str = "task_arithmetic",
    granularity: Literal["layer", "model"] = "layer",
    metric: Literal["dot", "cosine", "slope"] = "dot",
    zero_if_ascent: bool = False,
    pool_init: bool = False,
    init: str = "merge",
    gap_tolerance: float | None = None,
    select: Names = None,
    exclude: Names = None,
    missing: Literal["error", "zero"] = "error",
    batch: Annotated[int, Range(1)] = 8,
    max_length: Annotated[int, Range(1)] = 512,
    limit: Annotated[int | None, Help("Use at most this many records.")] = None,
    heads: Heads = None,
    amp: Annotated[bool, Help("bfloat16 autocast.")] = False,
    checkpointing: Annotated[bool, Help("Recompute blocks in the backward pass.")] = False,
    train_mode: Annotated[bool, Help("With dropout noise, as published.")] = False,
    reduction: Annotated[Literal["mean", "sum"], Help("Of the records' losses; sum as published.")] = "mean",
) -> Weight:
    """Steps towards the candidate with the lowest ⟨∇ℓ, θᵢ⟩ on calibration data; see ``fm.frank_wolfe``."""
    raise _whole("frank_wolfe")


@method(paper="arXiv:2503.12649", needs_data=True)
def frank_wolfe_soft(
    base: Weight,
    models: Models,
    *,
    data: Data,
    kind: Kind = "text",
    loss: Loss = None,
    preset: Preset = None,
    iterations: Count = 15,
    top_k: Annotated[int, Range(1)] = 4,
    constraint: Literal["simplex", "capped", "none"] = "simplex",
    optimizer: Literal["pgd", "adam"] = "pgd",
    inner_steps: Count = 20,
    inner_lr: float | None = None,
    per: Literal["layer", "model"] = "layer",
    selection: Literal["score", "tasks"] = "score",
    granularity: Literal["layer", "model"] = "layer",
    metric: Literal["dot", "cosine", "slope"] = "dot",
    init: str = "base",
    scale: Annotated[float, Range(0.0)] = 0.29,
    gap_tolerance: float | None = None,
    select: Names = None,
    exclude: Names = None,
    missing: Literal["error", "zero"] = "error",
    batch: Annotated[int, Range(1)] = 8,
    max_length: Annotated[int, Range(1)] = 512,
    limit: Annotated[int | None, Help("Use at most this many records.")] = None,
    heads: Heads = None,
    amp: Annotated[bool, Help("bfloat16 autocast.")] = False,
    checkpointing: Annotated[bool, Help("Recompute blocks in the backward pass.")] = False,
    train_mode: Annotated[bool, Help("With dropout noise, as published.")] = False,
    reduction: Annotated[Literal["mean", "sum"], Help("Of the records' losses; sum as published.")] = "mean",
) -> Weight:
    """Several vertices per step, their coefficients optimised on calibration data; see ``fm.frank_wolfe_soft``."""
    raise _whole("frank_wolfe_soft")


@frank_wolfe.run_job
@frank_wolfe_soft.run_job
def _run(recipe: Any, out: Any, *, cosines: bool, **options: Any) -> Any:
    from ..fw.recipes import run_recipe

    if cosines:
        raise BadInput(
            f"{recipe.merge_method} does not report cosines: it never holds two candidates at once",
            remedy="leave --cosines out; `fastmerge merge --cosines` with task_arithmetic on the same models shows them",
        )
    return run_recipe(recipe, out, **options)

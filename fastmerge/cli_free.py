"""Commands of FREE-Merging: ``free``, ``spectrum`` and ``route``; :func:`add_to` puts them on the command line's app."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ._terminal import failing_politely, say

route = typer.Typer(help="Train and evaluate routers, which pick the expert of a sample.", no_args_is_help=True)

Base = Annotated[Path, typer.Argument(help="The base checkpoint.")]
Models = Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Fine-tuned checkpoints.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Preset = Annotated[str | None, typer.Option(help="fr's preset: vit8, vit30, roberta, lm or llm.")]
Cutoff = Annotated[float | None, typer.Option(help="fr's cutoff.")]
Select = Annotated[str | None, typer.Option(help="Regular expression of the names that are filtered.")]


def free(
    base: Base,
    models: Models,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the backbone; experts go to OUT/experts.")],
    density: Annotated[float, typer.Option(help="Share of every task vector an expert keeps.")] = 0.01,
    mu: Annotated[str, typer.Option(help="paper, balanced, vit or constant.")] = "paper",
    constant: Annotated[float, typer.Option(help="The constant of --mu constant.")] = 7.0,
    by: Annotated[str, typer.Option(help="row or tensor.")] = "row",
    trim: Annotated[str, typer.Option(help="topk, window, random or rank_random.")] = "topk",
    combine: Annotated[str, typer.Option(help="add or override.")] = "add",
    lambda_: Annotated[float | None, typer.Option("--lambda", help="Factor of the backbone's coefficients.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Name of an expert, once per model. [default: the folders' names]")
    ] = None,
    preset: Preset = None,
    cutoff: Cutoff = None,
    select: Select = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Finish an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT, or start over.")] = False,
    nan: Annotated[str, typer.Option(help="error, warn or allow.")] = "error",
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Merge MODELS into an FR backbone and write one expert file per model (a recipe's `merge_method: free`)."""
    with failing_politely(debug=debug, json=json_):
        from . import _tables
        from .engine import run
        from .recipe import Recipe

        given = {
            "density": density, "mu": mu, "constant": constant, "by": by, "trim": trim, "combine": combine,
            "lambda_": lambda_, "preset": preset, "cutoff": cutoff, "select": select, "tasks": task,
        }  # fmt: skip
        known = {k: v for k, v in given.items() if v is not None}
        recipe = Recipe.from_call("free", str(base), [str(m) for m in models], known)
        report = run(recipe, out, dry_run=dry_run, resume=resume, force=force, nan=nan)
        if json_:
            print(report.to_json(), end="")
        elif dry_run:
            _tables.plan(recipe, report, out)
        else:
            _tables.summary(report)


def spectrum(
    base: Base,
    models: Models,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Picture to write: .png or .svg.")] = None,
    bands: Annotated[int, typer.Option(min=1, help="Bands of radial frequency.")] = 48,
    preset: Preset = None,
    cutoff: Cutoff = None,
    select: Select = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Spectra of the task deltas, their interference by band, and the energy the mask removes per tensor."""
    with failing_politely(debug=debug, json=json_):
        from .spectrum import draw
        from .spectrum import spectrum as measure

        found = measure(base, models, bands=bands, preset=preset, cutoff=cutoff, select=select)
        if out is not None:
            draw(found, out)
        if json_:
            typer.echo(json.dumps(found.json()))
            return
        for task, variance in found.variance.items():
            shares = [r[task] for r in found.removed.values()]
            say(
                f"{task}: amplitude variance {variance:.4f}, energy removed {100 * sum(shares) / len(shares):.2f} % a tensor"
            )


Samples = Annotated[Path, typer.Argument(help="Folder of <task>.safetensors files, each with a tensor `inputs`.")]


def _samples(folder: Path):  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file

    from .errors import BadInput

    found = {p.stem: load_file(p) for p in sorted(folder.glob("*.safetensors"))}
    for task, tensors in found.items():
        if "inputs" not in tensors:
            raise BadInput(f"no tensor `inputs` in {task}.safetensors", where=str(folder), remedy="save one per task")
    if not found:
        raise BadInput("no samples (*.safetensors)", where=str(folder), remedy="save {'inputs': tensor} per task")
    return {t: v["inputs"] for t, v in found.items()}


@route.command("train")
def route_train(
    samples: Samples,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for router.safetensors and router.json.")],
    kind: Annotated[str, typer.Option(help="vectors (or hidden states), image or tokens.")] = "vectors",
    epochs: Annotated[int, typer.Option(min=1)] = 60,
    seed: Annotated[int, typer.Option()] = 0,
    debug: Debug = False,
) -> None:
    """Train a router from a few labelled samples per task."""
    with failing_politely(debug=debug, json=False):
        from . import experts
        from .errors import BadInput

        if kind not in ("vectors", "image", "tokens"):
            raise BadInput(f"unknown --kind {kind!r}", remedy="one of vectors, image, tokens")
        data = _samples(samples)
        router = experts.train(data, kind=kind, epochs=epochs, seed=seed)  # type: ignore[arg-type]
        router.save(out)
        say(f"{len(data)} tasks, accuracy on the training samples {experts.evaluate(router, data).accuracy:.3f}, {out}")


@route.command("test")
def route_test(
    router: Annotated[Path, typer.Argument(help="Folder of a trained router.")],
    samples: Samples,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Accuracy and confusion of a router on labelled samples."""
    with failing_politely(debug=debug, json=json_):
        from . import experts

        result = experts.evaluate(experts.Router.load(router), _samples(samples))
        if json_:
            typer.echo(json.dumps(result.json()))
            return
        say(f"accuracy {result.accuracy:.4f}")
        for task, row in zip(result.tasks, result.confusion, strict=True):
            say(f"{task}: " + ", ".join(f"{t} {n}" for t, n in zip(result.tasks, row, strict=True) if n))


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command("free")(free)
    app.command("spectrum")(spectrum)
    app.add_typer(route, name="route")

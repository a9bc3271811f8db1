"""The command line. Exit codes: 0 done, 2 bad input, 3 interrupted and resumable, 1 a bug.

Nothing heavy is imported before a command needs it: ``fastmerge --help`` loads neither torch nor pydantic.
"""

from __future__ import annotations

import enum
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, cli_align, cli_fw
from ._terminal import Progress, collecting_rarely, failing_politely, say
from .cli_free import add_to as _add_free

app = typer.Typer(
    name="fastmerge",
    help="Merge trained neural networks into one.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class NanPolicy(str, enum.Enum):
    error = "error"
    warn = "warn"
    allow = "allow"


def parse_size(text: str | None) -> int | None:
    """Bytes of ``4G`` (4·10⁹), ``512MiB`` (512·2²⁰), ``5B`` (mergekit's billion) or a plain number."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtb]?)(i?)b?\s*", text, re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r} is not a size; write 4G, 900M or 2GiB")
    power = {"": 0, "k": 1, "m": 2, "g": 3, "b": 3, "t": 4}[found[2].lower()]
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML recipe; mergekit's are accepted as they are.")
]
OutPath = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist, or be empty.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, for machines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0 or cuda:all. auto takes a GPU where it is faster.")]
MaxVram = Annotated[str | None, typer.Option(metavar="SIZE", help="Bound per GPU. [default: 80 % of what is free]")]
Threads = Annotated[int | None, typer.Option("--threads", "-j", min=1, help="Workers. [default: every usable CPU]")]
MaxMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Bound on buffers: 4G, 900M. [default: small]")]
Pickles = Annotated[bool, typer.Option("--allow-pickle", help="Also read .bin/.pt files (weights only).")]
IgnoreExtra = Annotated[bool, typer.Option("--ignore-extra", help="Leave out tensors the base does not have.")]
Cosines = Annotated[bool, typer.Option("--cosines", help="Report how alike the models are; reads them once more.")]
Resume = Annotated[bool, typer.Option("--resume", help="Finish an interrupted merge; same bytes as without a break.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT, or start an interrupted merge over.")]
Nan = Annotated[NanPolicy, typer.Option("--nan", help="What NaN or Inf in an input does.")]
ShardSize = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Most bytes per output file. [default: as the base]")
]

_add_free(app)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def merge(
    recipe: RecipePath,
    out: OutPath,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan, merge nothing.")
    ] = False,
    resume: Resume = False,
    force: Force = False,
    device: Device = "auto",
    threads: Threads = None,
    max_memory: MaxMemory = None,
    max_vram: MaxVram = None,
    shard_size: ShardSize = None,
    nan: Nan = NanPolicy.error,
    allow_pickle: Pickles = False,
    ignore_extra: IgnoreExtra = False,
    cosines: Cosines = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Merge the models of a recipe into a new checkpoint folder."""
    options = {
        "resume": resume, "force": force, "device": device, "threads": threads, "nan": nan.value,
        "max_memory": parse_size(max_memory), "max_vram": parse_size(max_vram), "allow_pickle": allow_pickle,
        "max_shard_bytes": parse_size(shard_size), "ignore_extra": ignore_extra, "cosines": cosines,
    }  # fmt: skip
    with failing_politely(debug=debug, json=json):
        _merge(recipe, out, options, dry_run=dry_run, json=json, quiet=quiet)


def _merge(
    recipe: Path, out: Path, options: dict[str, Any], *, dry_run: bool, json: bool, quiet: bool, seed: int | None = None
) -> None:
    from . import _tables
    from .engine import run
    from .recipe import Recipe

    loaded = Recipe.load(recipe)
    if seed is not None:
        loaded.seed = seed
    with Progress(enabled=not (quiet or dry_run)) as progress:
        report = run(loaded, out, progress=progress, dry_run=dry_run, **options)
    if json:
        print(report.to_json(), end="")
    elif dry_run:
        _tables.plan(loaded, report, out)
    elif not quiet:
        _tables.summary(report)


@app.command()
def check(
    recipe: RecipePath,
    allow_pickle: Pickles = False,
    ignore_extra: IgnoreExtra = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a recipe and the headers of its models; merge nothing."""
    with failing_politely(debug=debug, json=json):
        from . import _tables
        from .engine import run
        from .recipe import Recipe

        loaded = Recipe.load(recipe)
        report = run(loaded, None, dry_run=True, allow_pickle=allow_pickle, ignore_extra=ignore_extra)
        if json:
            print(report.to_json(), end="")
        else:
            _tables.plan(loaded, report, None)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one method and its parameters.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the merge methods, or describe one."""
    with failing_politely(debug=debug, json=json):
        from . import _tables

        _tables.methods(name, json=json)


@app.command()
def ops(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show one operator.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the tensor operators and their backends, or describe one."""
    with failing_politely(debug=debug, json=json):
        from . import _tables

        _tables.ops(name, json=json)


@app.command()
def demo(
    own: Annotated[list[Path] | None, typer.Argument(metavar="[DIR]...", help="More of --models.")] = None,
    models: Annotated[
        list[Path] | None, typer.Option(metavar="DIR...", help="Merge these checkpoints instead, the base first.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller network, trained in at most 90 seconds.")] = False,
    method: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this method; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for merges, table and chart.")] = Path("demo-out"),
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images and trained networks. [default: ~/.cache/fastmerge]")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train small networks on real images, merge them by every method, compare accuracies."""
    with failing_politely(debug=debug, json=json):
        from .demo.command import main as run_demo
        from .errors import BadInput

        if own and not models:
            raise BadInput(f"unexpected {own[0]}", remedy="write --models before the checkpoints, the base first")
        run_demo([*(models or []), *(own or [])] or None, quick=quick, out=out, cache=cache, json=json, methods=method)


@app.command()
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Show what this installation can do on this machine, and why not more."""
    with failing_politely(debug=debug, json=json):
        from . import _tables
        from ._doctor import doctor as examine

        _tables.doctor(examine(), json=json)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]... | compare A.jsonl B.jsonl...", help="Operators; all without one."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All sizes.")] = False,
    only: Annotated[str, typer.Option(metavar="TEXT", help="The sizes whose names hold TEXT.")] = "",
    backend: Annotated[
        list[str] | None, typer.Option(help="Time only this: cpu, torch, reference, ... (repeatable).")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="The references under torch.compile too.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    budget: Annotated[float, typer.Option(min=0.01, help="Seconds per call and size.")] = 1.0,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Append the rows to this JSONL file.")] = None,
    html: Annotated[Path, typer.Option(metavar="FILE", help="compare: the page to write.")] = Path("bench.html"),
    debug: Debug = False,
) -> None:
    """Time operators against their references and the machine's limits; nothing is timed that is wrong.

    `bench compare A.jsonl B.jsonl` prints ratios between saved runs, and writes a page with rooflines and bars.
    """
    with failing_politely(debug=debug, json=False):
        if names and names[0] == "compare":
            from .benchmarks.compare import compare

            compare([Path(n) for n in names[1:]], html)
            return
        from .benchmarks.run import run

        run(
            names or (), full=full, compiled=compile_, device=device, budget=budget, save=save, only=only,
            backends=backend or (),
        )  # fmt: skip


cli_align.register(app)
cli_fw.register(app)


def main() -> None:
    """Entry point ``fastmerge``."""
    with collecting_rarely():
        app()


# ---- fastmerge-yaml: mergekit-yaml's words

yaml_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_IGNORED = {
    "allow_crimes": "--allow-crimes: tensors are matched by name, whatever the architecture",
    "trust_remote_code": "--trust-remote-code: no code of a model is ever run",
    "lora_merge_cache": "--lora-merge-cache: adapters are not merged on the fly",
    "lora_merge_dtype": "--lora-merge-dtype: adapters are not merged on the fly",
    "low_cpu_memory": "--low-cpu-memory: memory is bounded anyway",
    "lazy_unpickle": "--lazy-unpickle: reading is lazy anyway (pickles need --allow-pickle)",
    "read_to_gpu": "--read-to-gpu: the engine decides where to read",
    "multi_gpu": "--multi-gpu: use --device cuda:all",
    "gpu_rich": "--gpu-rich: the engine decides where to compute",
    "cuda": "--cuda: the GPU is taken where it is faster (--device cuda insists)",
    "async_write": "--async-write: writing overlaps with reading and computing anyway",
    "write_threads": "--write-threads: use --num-threads",
    "clone_tensors": "--clone-tensors: tied tensors need no copies",
}


@yaml_app.command()
def mergekit_yaml(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG_FILE")],
    out_path: Annotated[Path, typer.Argument(metavar="OUT_PATH")],
    num_threads: Annotated[int | None, typer.Option("--num-threads", "-j", min=1)] = None,
    device: Annotated[str | None, typer.Option()] = None,
    out_shard_size: Annotated[str | None, typer.Option(help="Most bytes per output file, e.g. 5B.")] = None,
    random_seed: Annotated[int | None, typer.Option()] = None,
    transformers_cache: Annotated[Path | None, typer.Option(help="Where downloaded models are kept.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet/--no-quiet")] = False,
    verbose: Annotated[int, typer.Option("-v", count=True)] = 0,
    resume: Resume = False,
    force: Force = False,
    nan: Nan = NanPolicy.error,
    max_memory: MaxMemory = None,
    allow_pickle: Pickles = False,
    copy_tokenizer: Annotated[bool, typer.Option("--copy-tokenizer/--no-copy-tokenizer")] = True,
    write_model_card: Annotated[bool, typer.Option("--write-model-card/--no-write-model-card")] = True,
    safe_serialization: Annotated[bool, typer.Option("--safe-serialization/--no-safe-serialization")] = True,
    unsafe_truncate_embeddings: Annotated[
        bool, typer.Option("--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings")
    ] = False,
    allow_crimes: Annotated[bool, typer.Option("--allow-crimes/--no-allow-crimes")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code/--no-trust-remote-code")] = False,
    lora_merge_cache: Annotated[str | None, typer.Option()] = None,
    lora_merge_dtype: Annotated[str | None, typer.Option()] = None,
    cuda: Annotated[bool, typer.Option("--cuda/--no-cuda")] = False,
    low_cpu_memory: Annotated[bool, typer.Option("--low-cpu-memory/--no-low-cpu-memory")] = False,
    lazy_unpickle: Annotated[bool, typer.Option("--lazy-unpickle/--no-lazy-unpickle")] = False,
    read_to_gpu: Annotated[bool, typer.Option("--read-to-gpu/--no-read-to-gpu")] = False,
    multi_gpu: Annotated[bool, typer.Option("--multi-gpu/--no-multi-gpu")] = False,
    gpu_rich: Annotated[bool, typer.Option("--gpu-rich")] = False,
    async_write: Annotated[bool, typer.Option("--async-write/--no-async-write")] = False,
    write_threads: Annotated[int | None, typer.Option()] = None,
    clone_tensors: Annotated[bool, typer.Option("--clone-tensors/--no-clone-tensors")] = False,
    debug: Debug = False,
) -> None:
    """Merge as mergekit-yaml does: the same file, the same flags. Those without a meaning here are ignored with a note."""
    given = dict(locals())
    with failing_politely(debug=debug, json=False):
        from .errors import BadInput

        if not safe_serialization:
            raise BadInput("only safetensors are written", remedy="remove --no-safe-serialization")
        if unsafe_truncate_embeddings:
            raise BadInput(
                "--unsafe-truncate-embeddings is not supported", remedy="bring the models to one vocabulary first"
            )
        notes = [sentence for flag, sentence in _IGNORED.items() if given[flag]]
        if not copy_tokenizer:
            notes.append("--no-copy-tokenizer: the base's tokenizer files are always copied")
        if not write_model_card:
            notes.append("--no-write-model-card: the card is always written")
        if not quiet:
            for note in notes:
                say(f"note: ignored {note}")
        if transformers_cache is not None:
            import os

            os.environ["HF_HUB_CACHE"] = str(transformers_cache)
        options = {
            "resume": resume, "force": force, "device": device or "auto", "threads": num_threads,
            "nan": nan.value, "max_memory": parse_size(max_memory), "max_shard_bytes": parse_size(out_shard_size),
            "allow_pickle": allow_pickle,
        }  # fmt: skip
        _merge(config_file, out_path, options, dry_run=False, json=False, quiet=quiet, seed=random_seed)


def main_yaml() -> None:
    """Entry point ``fastmerge-yaml``."""
    with collecting_rarely():
        yaml_app()


if __name__ == "__main__":
    main()

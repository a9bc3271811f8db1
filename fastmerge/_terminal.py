"""What the command line prints while it works and when it fails: to stderr, so that stdout stays for results."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from .errors import BadInput, FastmergeError


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def imported(reference: str, option: str) -> Any:
    """What ``module:function`` or ``file.py:function`` returns when called without arguments."""
    import importlib
    import importlib.util

    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise BadInput(
            f"{option} {reference!r} is not MODULE:FUNCTION or FILE.py:FUNCTION",
            remedy="name the function after a colon",
        )
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location("fastmerge_user_code", place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        make = getattr(module, name)
    except (ImportError, OSError, AttributeError) as error:
        raise BadInput(
            f"{option} {reference!r} can not be imported ({error})",
            remedy="check the path, and that python can import it",
        ) from error
    return make()


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """A command's process collects garbage every 100 000 objects, not every 700, and not at its end.

    Importing torch makes some 180 000 objects that all stay: looking through them again and again, and once more when the
    interpreter stops, takes a third of the CPU time of starting and stopping.
    """
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        if "triton" not in sys.modules:  # whose bindings report at the end what was not collected
            gc.freeze()


@contextlib.contextmanager
def failing_politely(*, debug: bool, json: bool) -> Iterator[None]:
    """Turns errors into a sentence, a place and a remedy, and the exit codes 1 (bug), 2 (bad input), 3 (resumable)."""
    import typer

    try:
        yield
    except FastmergeError as error:
        _tell(error, error.exit_code, debug=debug, json=json)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt as error:
        _tell(FastmergeError("interrupted before any work was done"), 3, debug=debug, json=json, cause=error)
        raise typer.Exit(3) from None
    except BrokenPipeError:  # `fastmerge methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        named = FastmergeError(
            f"{error.strerror or error}",
            where=str(error.filename) if error.filename else None,
            remedy="check that the path exists, that you may use it, and that the disk is well",
        )
        _tell(named, 2, debug=debug, json=json, cause=error)
        raise typer.Exit(2) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        bug = FastmergeError(
            f"{type(error).__name__}: {error}",
            remedy="this is a bug in fastmerge; please report it with the output of --debug",
        )
        _tell(bug, 1, debug=debug, json=json, cause=error)
        raise typer.Exit(1) from None


def _tell(error: FastmergeError, code: int, *, debug: bool, json: bool, cause: BaseException | None = None) -> None:
    if debug:
        import traceback

        shown = cause or error
        say("".join(traceback.format_exception(type(shown), shown, shown.__traceback__)).rstrip())
    if json:
        import json as js

        said = {"message": error.message, "where": error.where, "what_to_do": error.remedy}
        print(js.dumps({"error": said, "exit_code": code}))
    else:
        word = "\x1b[31merror:\x1b[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "error:"
        say(f"{word} {error}")


def rss() -> int:
    """Resident bytes of this process now; 0 where the kernel does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def gigabytes(count: float) -> str:
    """``1.23 GB``, in MB below 0.01 GB and in kB below 0.01 MB."""
    unit, size = _unit(count)
    return f"{count / size:.2f} {unit}"


def _unit(count: float) -> tuple[str, float]:
    return ("GB", 1e9) if count >= 1e7 else ("MB", 1e6) if count >= 1e4 else ("kB", 1e3)


class Progress:
    """Call it with (bytes done, bytes in all, phase). A bar on a terminal, else one line per second."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.bar: Any = None
        self.tasks: dict[str, Any] = {}
        self.started: dict[str, float] = {}
        self.first: dict[str, int] = {}
        self.last = 0.0

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("RSS {task.fields[rss]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, phase: str) -> None:
        if not self.enabled:
            return
        now = time.monotonic()
        if phase not in self.started:
            self.started[phase], self.first[phase] = now, done  # a resumed job does not start at 0
            if self.bar is not None:
                self.tasks[phase] = self.bar.add_task(phase, total=total, rate="", rss="")
        spent = now - self.started[phase]
        rate = (done - self.first[phase]) / spent if spent > 0 else 0.0
        speed = f"{gigabytes(rate)}/s" if rate else ""
        if self.bar is not None:
            self.bar.update(self.tasks[phase], completed=done, total=total, rate=speed, rss=gigabytes(rss()))
        elif now - self.last >= 1.0 and rate:
            self.last = now
            left = int((total - done) / rate)
            unit, size = _unit(total)
            say(
                f"{phase} {done / size:.2f}/{total / size:.2f} {unit} · {speed} · "
                f"ETA {left // 60}:{left % 60:02d} · RSS {gigabytes(rss())}"
            )

"""Kernels in Triton's interpreter need TRITON_INTERPRET=1 before Triton is imported, which a process can not change
later: the tests in triton_interpreted/ are collected only there. test_triton.py looks at what that process, and the one
that compiles for every target, have found. Both start with the session, at low priority, beside the other tests."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETING else ["triton_interpreted"]
_running = pytest.StashKey[tuple[tempfile.TemporaryDirectory[str], dict[str, subprocess.Popen[str]]]]()


def _start():
    held = tempfile.TemporaryDirectory(prefix="triton-")
    folder = Path(held.name)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "FASTMERGE_BACKEND", "PYTEST"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment["OMP_NUM_THREADS"] = "1"

    def start(name: str, command: list[str], **extra: str) -> subprocess.Popen[str]:
        with (folder / name).open("w") as out:
            return subprocess.Popen(
                ["nice", "-n", "5", sys.executable, *command], cwd=HERE.parent.parent, env=environment | extra,
                stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip

    compiling = [str(HERE / "triton_aot.py"), "--out", str(folder / "table.json")]
    interpreting = ["-m", "pytest", "-q", str(HERE / "triton_interpreted")]
    return held, {
        "aot": start("aot", compiling, TRITON_CACHE_DIR=str(folder / "cache")),
        "interpreted": start("interpreted", interpreting, TRITON_INTERPRET="1"),
    }


def pytest_collection_finish(session):
    wanted = any(item.path.name == "test_triton.py" for item in session.items)
    if wanted and not INTERPRETING and not session.config.option.collectonly:
        session.config.stash[_running] = _start()


def pytest_unconfigure(config):
    held, running = config.stash.get(_running, (None, {}))
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the workers that it forked
        process.wait()
    if held is not None:
        held.cleanup()


@pytest.fixture(scope="session")
def triton_processes(request):
    """(folder, {"aot", "interpreted": Popen}): output in folder/NAME, the resource table in folder/table.json."""
    held, running = request.config.stash[_running]
    return Path(held.name), running

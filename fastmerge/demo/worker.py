"""One fine-tune in a process of its own: ``python -m fastmerge.demo.worker FOLDER TASK DATA``.

Networks this small gain little from two threads and lose a lot when another process wants a core, so the demo trains
with one thread per network and several networks at a time. FOLDER is a family that has its base and heads; shares done
go to stdout, one a line. Nothing depends on how many of these run at once.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from . import train
from .tasks import Task, load_task
from .vit import Shape, load_checkpoint, save_checkpoint


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread per torch operation, in this thread and those started meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_settings(folder: Path, settings: train.Settings) -> None:
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")


def read_settings(folder: Path) -> train.Settings:
    fields = json.loads((folder / "settings.json").read_text())
    return train.Settings(**{**fields, "shape": Shape(**fields["shape"])})


def finetune_one(folder: Path, task: Task, tell: Callable[[float], None]) -> None:
    """Fine-tune the family's base on one task and save it beside the base."""
    settings = read_settings(folder)
    base, heads = load_checkpoint(folder / "base"), load_checkpoint(folder / "heads")
    with one_thread():
        state = train.finetune(base, task, heads[task.name], settings, lambda _name, share: tell(share))
    save_checkpoint(folder / task.name, state, settings.shape)


def finetune_all(folder: Path, tasks: Mapping[str, Task], data: Path, processes: int, progress: train.Progress) -> None:
    """Fine-tune on every task, `processes` at a time; with one, in this process."""
    if processes == 1:
        for task in tasks.values():
            finetune_one(folder, task, functools.partial(progress, task.name))
        return

    def run(name: str) -> None:
        command = [sys.executable, "-m", __name__, str(folder), name, str(data)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                for line in process.stdout:
                    progress(name, float(line))
                errors = process.stderr.read()
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            raise RuntimeError(f"fine-tuning on {name} failed:\n{errors}")

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, tasks))


if __name__ == "__main__":
    family, task_name, data_folder = sys.argv[1:]
    finetune_one(Path(family), load_task(task_name, Path(data_folder)), lambda share: print(f"{share:.4f}", flush=True))

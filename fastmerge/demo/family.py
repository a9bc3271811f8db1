"""The demo's family of checkpoints: a base and one fine-tune per task, trained once and cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import train
from .tasks import Split, Task, load_tasks
from .vit import VisionTransformer, load_checkpoint, logits, save_checkpoint
from .worker import cores, finetune_all, one_thread, write_settings

Batch = tuple[str, torch.Tensor, torch.Tensor]  # task, images, labels


def default_cache() -> Path:
    """$XDG_CACHE_HOME/fastmerge, ~/.cache/fastmerge when it is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmerge"


@dataclass(frozen=True)
class DemoFamily:
    """Checkpoint directories of one architecture with the tasks they were trained for.

    base_dir, task_dirs: ordinary checkpoint directories (config.json, model.safetensors), in the tasks' order.
    heads: for each task the frozen prototypes [classes, width] that turn features into logits.
    """

    base_dir: Path
    task_dirs: dict[str, Path]
    tasks: dict[str, Task]
    heads: dict[str, torch.Tensor]
    settings: train.Settings

    def state(self, task: str | None = None) -> dict[str, torch.Tensor]:
        """The state dict of the base, or of a task's fine-tune."""
        return load_checkpoint(self.base_dir if task is None else self.task_dirs[task])

    def model(self, state: Mapping[str, torch.Tensor] | None = None) -> VisionTransformer:
        """The body (images [n, 1, 28, 28] -> features [n, width]) with `state`'s weights (default: the base's), in
        evaluation mode."""
        model = VisionTransformer(self.settings.shape)
        model.load_state_dict({k: v.float() for k, v in (self.state() if state is None else state).items()})
        return model.eval()

    def split(self, task: str, split: str, limit: int | None = None) -> Split:
        """Images and labels of a task's "train", "calibration" or "test" part; the first `limit` of them."""
        if split not in ("train", "calibration", "test"):
            raise ValueError(f"split is 'train', 'calibration' or 'test', not {split!r}")
        part: Split = getattr(self.tasks[task], split)
        return part if limit is None else part.head(limit)

    def accuracy(
        self,
        model: torch.nn.Module,
        tasks: Sequence[str],
        split: str = "test",
        limit: int | None = None,
        batch: int = 125,
    ) -> dict[str, float]:
        """Share of each task's images that `model` (images -> features) classifies rightly with the task's head.

        Batches run one a core, each on one thread: the result does not depend on the number of cores.
        """
        parts = {task: self.split(task, split, limit) for task in tasks}

        @torch.inference_mode()
        def right(job: Batch) -> tuple[str, int]:
            task, images, labels = job
            return task, int((logits(model(images), self.heads[task]).argmax(1) == labels).sum())

        counts = dict.fromkeys(tasks, 0)
        jobs = [(task, x, y) for task, part in parts.items() for x, y in part.batches(batch)]
        with one_thread(), ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for task, count in pool.map(right, jobs):
                counts[task] += count
        return {task: counts[task] / len(part) for task, part in parts.items()}

    def evaluate(
        self,
        state: Mapping[str, torch.Tensor],
        split: str = "test",
        tasks: Sequence[str] | None = None,
        limit: int | None = None,
    ) -> dict[str, float]:
        """{task: accuracy} of one state dict on every task (or those named)."""
        return self.accuracy(self.model(state), list(tasks or self.tasks), split, limit)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of a (task, images, labels) batch."""
        task, images, labels = batch
        return torch.nn.functional.cross_entropy(logits(model(images), self.heads[task]), labels)

    def calibration(self, task: str, batch: int = 50, limit: int | None = 100) -> list[Batch]:
        """Labelled batches from a task's calibration part (default: its first 100 images)."""
        return [(task, x, y) for x, y in self.split(task, "calibration", limit).batches(batch)]


def _key(settings: train.Settings) -> str:
    """Changes with the settings and with the code that makes the data or the networks."""
    here = Path(__file__).parent
    code = b"".join((here / f).read_bytes() for f in ("sources.py", "tasks.py", "vit.py", "train.py"))
    return hashlib.sha256(code + json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:16]


def prepare(
    quick: bool = True,
    cache: str | os.PathLike[str] | None = None,
    progress: train.Progress | None = None,
    settings: train.Settings | None = None,
    processes: int | None = None,
) -> DemoFamily:
    """The demo's checkpoints, trained on first use and read from the cache afterwards.

    quick: the small network (~45 s of training on two cores) instead of the full one (~5 minutes). cache: a folder
    (default: see default_cache). progress: called with what is trained and the share done. settings: instead of
    those that quick picks. processes: fine-tunes that train at once (default: one a core); the result does not depend
    on it. Raises sources.DataUnavailable when the images can be neither found nor downloaded.
    """
    settings = settings or (train.QUICK if quick else train.FULL)
    progress = progress or (lambda _name, _share: None)
    root = Path(cache) if cache is not None else default_cache()
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    tasks = load_tasks(data)
    folder = root / "demo" / _key(settings)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _train(draft, tasks, settings, data, processes or cores(), progress)
            try:
                draft.rename(folder)
            except OSError:  # another process trained the same family meanwhile
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    heads = load_checkpoint(folder / "heads")
    task_dirs = {name: folder / name for name in tasks}
    return DemoFamily(folder / "base", task_dirs, tasks, {name: heads[name] for name in tasks}, settings)


def _train(
    folder: Path,
    tasks: Mapping[str, Task],
    settings: train.Settings,
    data: Path,
    processes: int,
    progress: train.Progress,
) -> None:
    write_settings(folder, settings)
    with one_thread():
        base = train.pretrain(tasks, settings, progress)
        body = VisionTransformer(settings.shape)
        body.load_state_dict(base)
        heads = {name: train.prototypes(body, task, settings.head_per_class) for name, task in tasks.items()}
    save_checkpoint(folder / "base", base, settings.shape)
    save_checkpoint(folder / "heads", heads, settings.shape)
    finetune_all(folder, tasks, data, processes, progress)

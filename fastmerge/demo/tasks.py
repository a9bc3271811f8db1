"""The demo's tasks: five sets of real images, each cut once into train, calibration and test.

Hyper-parameters are chosen on the calibration images, accuracy is reported on the test images, and no image (nor a
copy of one) is in two parts. Everything follows from the seed in here, never from a run's settings.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .sources import SIDE, SOURCES, Images, Labels

SEED = 20260
CALIBRATION, TEST = 300, 1000  # images of each task
# Consecutive rows of the satellite table are neighbouring patches that share pixels, so whole stretches of it go to
# one part; the others have independent rows.
STRETCH = {"satellite": 40}
TITLES = {
    "digits": "handwritten digits (MNIST)",
    "animals": "animal silhouettes",
    "scans": "scanned digits, 8×8 (optdigits)",
    "pens": "pen strokes (penbased)",
    "satellite": "satellite patches (Landsat)",
}


@dataclass(frozen=True)
class Split:
    """Images [n, 1, 28, 28] float32 in [-1, 1] and labels [n] int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, size: int, generator: torch.Generator | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) in order, or in an order drawn from `generator`; the last batch may be shorter."""
        n = len(self)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for start in range(0, n, size):
            at = order[start : start + size]
            yield self.images[at], self.labels[at]

    def head(self, n: int) -> Split:
        """The first n examples (they are in random order)."""
        return Split(self.images[:n], self.labels[:n])

    def few(self, per_class: int) -> Split:
        """The first `per_class` examples of each class."""
        at = torch.cat([torch.nonzero(self.labels == c)[:per_class, 0] for c in range(int(self.labels.max()) + 1)])
        return Split(self.images[at], self.labels[at])

    def classes(self, keep: list[int]) -> Split:
        """The examples of the classes in `keep`, labels unchanged."""
        at = torch.isin(self.labels, torch.tensor(keep))
        return Split(self.images[at], self.labels[at])


@dataclass(frozen=True)
class Task:
    """One classification task."""

    name: str
    classes: int
    train: Split
    calibration: Split
    test: Split

    @property
    def title(self) -> str:
        return TITLES[self.name]


def task_names() -> list[str]:
    return list(SOURCES)


def _parts(name: str, images: Images, labels: Labels) -> tuple[Images, Labels, list[int]]:
    """Unique images in the order test, calibration, train, and where each part starts."""
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    first.sort()
    images, labels = images[first], labels[first]
    seed = int.from_bytes(hashlib.sha256(f"{SEED} {name}".encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.PCG64(seed))
    stretch = STRETCH.get(name, 1)
    stretches = rng.permutation(-(-len(images) // stretch))
    order = (stretches[:, None] * stretch + np.arange(stretch)).ravel()
    order = order[order < len(images)]
    # Within a part the order is random too, so that its first n examples are a fair sample.
    cuts = [0, TEST, TEST + CALIBRATION, len(images)]
    order = np.concatenate([rng.permutation(order[a:b]) for a, b in itertools.pairwise(cuts)])
    return images[order], labels[order], cuts


def load_task(name: str, folder: Path) -> Task:
    """Task `name`; `folder` holds, or gets, the wheels that its images come from and the decoded images."""
    packed = folder / f"{name}-{_code_key()}.npz"
    if packed.is_file():
        with np.load(packed) as saved:
            images, labels, cuts = saved["images"], saved["labels"], saved["cuts"].tolist()
    else:
        images, labels, cuts = _parts(name, *SOURCES[name](folder))
        draft = packed.with_name(f".{packed.name}.{id(images)}.npz")
        np.savez_compressed(draft, images=images, labels=labels, cuts=np.array(cuts))
        draft.replace(packed)
    pixels = torch.from_numpy(images).reshape(-1, 1, SIDE, SIDE)
    splits = [
        Split(pixels[a:b].float().div_(127.5).sub_(1), torch.from_numpy(labels[a:b]))
        for a, b in itertools.pairwise(cuts)
    ]
    return Task(name, int(labels.max()) + 1, train=splits[2], calibration=splits[1], test=splits[0])


def load_tasks(folder: Path, names: list[str] | None = None) -> dict[str, Task]:
    return {name: load_task(name, folder) for name in names or task_names()}


def _code_key() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / f).read_bytes() for f in ("sources.py", "tasks.py"))).hexdigest()[:12]

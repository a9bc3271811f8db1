"""Two networks that no fine-tuning relates: trained from different seeds on the two halves of the digits' classes.

Their hidden units are in unrelated orders, so the plain average of their weights knows nothing; aligning the units
first (MuDSC, Git Re-Basin, ZipIt) is what makes a merge possible. Both map images to features that are compared with
the same fixed label embeddings, so that one merged body can be asked for all ten classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from . import train
from .family import default_cache
from .tasks import Split, Task, load_task
from .vit import load_checkpoint, logits
from .worker import one_thread

HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
TASK = "digits"


@dataclass(frozen=True)
class PairSettings:
    """width: channels of the first layer. features: width of the label embeddings."""

    width: int = 32
    features: int = 32
    steps: int = 200
    batch: int = 64
    rate: float = 3e-3
    weight_decay: float = 1e-3


QUICK = PairSettings()
FULL = PairSettings(width=48, steps=350)


class ConvNet(nn.Module):
    """Three convolutions with batch norm, and one linear layer to the features."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = functional.relu(self.bn3(self.conv3(x)))
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


@dataclass(frozen=True)
class DemoPair:
    """dirs: two checkpoint directories. head: label embeddings [10, features], rows orthonormal. task: the images."""

    dirs: tuple[Path, Path]
    head: torch.Tensor
    task: Task
    settings: PairSettings

    def model(self, which: int | Mapping[str, torch.Tensor]) -> ConvNet:
        """The first (0) or second (1) network, or one with the state dict given; in evaluation mode."""
        model = ConvNet(self.settings.width, self.settings.features)
        model.load_state_dict(load_checkpoint(self.dirs[which]) if isinstance(which, int) else which)
        return model.eval()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "test", limit: int | None = None) -> dict[str, float]:
        """Accuracy over all ten classes on all images ("joint") and on those of each half ("0-4", "5-9")."""
        part: Split = getattr(self.task, split)
        part = part if limit is None else part.head(limit)
        features = torch.cat([model(x) for x, _ in part.batches(250)])
        right = logits(functional.normalize(features, dim=1), self.head).argmax(1) == part.labels
        found = {"joint": float(right.float().mean())}
        for half in HALVES:
            own = torch.isin(part.labels, torch.tensor(half))
            found[f"{half[0]}-{half[-1]}"] = float(right[own].float().mean())
        return found

    def images(self, n: int = 1000, batch: int = 250) -> list[torch.Tensor]:
        """Unlabelled training images of all classes, for activation statistics and batch norm."""
        return [x for x, _ in self.task.train.head(n).batches(batch)]


def _train(task: Task, half: tuple[int, ...], seed: int, head: torch.Tensor, settings: PairSettings) -> ConvNet:
    generator = torch.Generator().manual_seed(seed)
    model = ConvNet(settings.width, settings.features)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    nn.init.zeros_(model.fc.bias)
    own = head[list(half)]

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits(functional.normalize(model(x), dim=1), own), y - half[0])

    recipe = replace(train.QUICK, batch=settings.batch, weight_decay=settings.weight_decay)
    data = task.train.classes(list(half))
    parameters = list(model.parameters())
    train._optimize(
        model, loss_of, parameters, data, settings.steps, settings.rate, recipe, generator, lambda _share: None
    )
    return model


def save_network(folder: Path, state: Mapping[str, torch.Tensor], settings: PairSettings) -> None:
    """An ordinary checkpoint directory."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {"architectures": ["FastmergeDemoConvNet"], "model_type": "fastmerge_demo_convnet", **asdict(settings)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(dict(state), str(folder / "model.safetensors"), metadata={"format": "pt"})


def prepare_pair(cache: str | os.PathLike[str] | None = None, settings: PairSettings | None = None) -> DemoPair:
    """The two networks, trained on first use (one thread each, side by side), and what evaluates their merge."""
    settings = settings or PairSettings()
    root = Path(cache) if cache is not None else default_cache()
    (root / "data").mkdir(parents=True, exist_ok=True)
    task = load_task(TASK, root / "data")
    here = Path(__file__).parent
    code = b"".join((here / f).read_bytes() for f in ("sources.py", "tasks.py", "train.py", "pair.py"))
    key = hashlib.sha256(code + json.dumps(asdict(settings)).encode()).hexdigest()[:16]
    folder = root / "demo" / f"pair-{key}"
    draw = torch.randn(settings.features, settings.features, generator=torch.Generator().manual_seed(0))
    head = torch.linalg.qr(draw).Q[:10].contiguous()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with (
                ThreadPoolExecutor(len(HALVES), initializer=torch.set_num_threads, initargs=(1,)) as pool,
                one_thread(),
            ):
                nets = pool.map(lambda k: _train(task, HALVES[k], 100 + k, head, settings), range(len(HALVES)))
                for i, net in enumerate(nets):
                    save_network(draft / f"half{i + 1}", net.state_dict(), settings)
            try:
                draft.rename(folder)
            except OSError:  # another process made it meanwhile
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return DemoPair((folder / "half1", folder / "half2"), head, task, settings)

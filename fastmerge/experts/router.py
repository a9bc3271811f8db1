"""Routers: which expert a sample belongs to, from hidden states, images or tokens. Minutes on a CPU to train."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..io.checkpoint import read_object

FORMAT, VERSION = "fastmerge-router", "1"
Kind = Literal["vectors", "image", "tokens"]
_SIDE = 8  # images are averaged down to this many cells a side
_BUCKETS = 4096  # hashed token features


def features(kind: Kind, x: Tensor) -> Tensor:
    """float32 [B, F] of a batch, a fixed function without parameters.

    - ``vectors`` [B, F] as they are; [B, L, F] hidden states: the mean over L.
    - ``image`` [B, C, H, W] or [B, H, W] (uint8 counts as 0..255): an 8×8 average of every channel, and every channel's
      mean, deviation and mean gradients, of the image scaled to [0, 1] when it is uint8.
    - ``tokens`` integer [B, L]: counts of hashed tokens and pairs of neighbours in 4096 buckets, scaled to length 1.
    """
    if kind == "vectors":
        if x.ndim not in (2, 3):
            raise BadInput(
                f"vectors are [B, F] or [B, L, F], not {list(x.shape)}",
                remedy="pass a batch (x[None] for one sample), or make the router with another kind",
            )
        return (x.mean(1) if x.ndim == 3 else x).float()
    if kind == "image":
        if x.ndim not in (3, 4):
            raise BadInput(
                f"images are [B, C, H, W] or [B, H, W], not {list(x.shape)}",
                remedy="pass a batch (x[None] for one sample), or make the router with another kind",
            )
        image = x.unsqueeze(1) if x.ndim == 3 else x
        image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        cells = nn.functional.adaptive_avg_pool2d(image, _SIDE).flatten(1)
        moments = [image.mean((2, 3)), image.std((2, 3), correction=0)]
        moments += [image.diff(dim=d).abs().mean((2, 3)) if image.shape[d] > 1 else moments[0] * 0 for d in (2, 3)]
        return torch.cat([cells, *moments], 1)
    if x.ndim != 2 or x.is_floating_point():
        raise BadInput(
            f"tokens are integers [B, L], not {x.dtype} {list(x.shape)}",
            remedy="pass a batch of input_ids, padded to one length; vectors and images are other kinds of router",
        )
    ids = x.long()
    pairs = ids[:, :-1] * 1_000_003 + ids[:, 1:] + 7
    hashed = torch.cat([ids * 2_654_435_761, pairs * 2_654_435_761], 1).remainder(2**31) % _BUCKETS
    counts = torch.zeros(len(x), _BUCKETS, device=x.device)
    counts.scatter_add_(1, hashed, torch.ones_like(hashed, dtype=torch.float32))
    return nn.functional.normalize(counts, dim=1)


class Router(nn.Module):
    """An MLP with one hidden layer on standardised features: ``router(x)`` -> scores [B, T].

    Args:
        tasks: names of the tasks, in the order of the scores.
        kind: what the input is; see :func:`features`.
        inputs: number of features.
        hidden: width of the hidden layer.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, tasks: Sequence[str], kind: Kind, inputs: int, hidden: int = 128) -> None:
        super().__init__()
        self.tasks, self.kind = list(tasks), kind
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.layers = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, len(self.tasks)))

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        scores: Tensor = self.layers((features(self.kind, x) - self.mean) * self.scale)
        return scores

    def save(self, folder: str | Path) -> None:
        """``router.safetensors`` and ``router.json`` (format, version, kind, tasks, inputs, hidden) in a folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, folder / "router.safetensors"
        )
        about = {
            "format": FORMAT, "version": VERSION, "kind": self.kind, "tasks": self.tasks,
            "inputs": first.in_features, "hidden": first.out_features,
        }  # fmt: skip
        (folder / "router.json").write_text(json.dumps(about, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Router:
        """Raises BadInput for a folder without a router of this format."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        remedy = "check the path, or train it again: fastmerge route train"
        about = read_object(folder / "router.json", remedy)
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise BadInput(f"not a {FORMAT} of version {VERSION}", where=str(folder / "router.json"), remedy=remedy)
        try:
            router = cls(about["tasks"], about["kind"], about["inputs"], about["hidden"])
            router.load_state_dict(load_file(folder / "router.safetensors"))
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise BadInput(f"the router can not be read: {error}", where=str(folder), remedy=remedy) from None
        return router.eval()


@dataclass(frozen=True)
class Evaluation:
    """How a router does on labelled samples."""

    tasks: list[str]
    confusion: list[list[int]]  # [true task][chosen task]

    @property
    def accuracy(self) -> float:
        total = sum(map(sum, self.confusion))
        return sum(row[i] for i, row in enumerate(self.confusion)) / total if total else 0.0

    def json(self) -> dict[str, Any]:
        return {"tasks": self.tasks, "accuracy": self.accuracy, "confusion": self.confusion}


def train(
    samples: Mapping[str, Tensor],
    *,
    kind: Kind = "vectors",
    hidden: int = 128,
    epochs: int = 60,
    lr: float = 3e-3,
    batch: int = 256,
    seed: int = 0,
) -> Router:
    """A router from a few samples per task (tens to thousands), by AdamW on cross-entropy; classes weigh the same.

    samples: task -> inputs as :func:`features` takes them. Seeded; the caller's random state is left alone.
    Raises: BadInput for fewer than two tasks, a task without samples, or inputs of different feature lengths.
    """
    if len(samples) < 2 or any(len(x) == 0 for x in samples.values()):
        raise BadInput("a router needs at least two tasks with samples each", remedy="give labelled inputs per task")
    feats = [features(kind, x) for x in samples.values()]
    if len({f.shape[1] for f in feats}) != 1:
        lengths = ", ".join(f"{t}: {f.shape[1]}" for t, f in zip(samples, feats, strict=True))
        raise BadInput(f"tasks have different numbers of features ({lengths})", remedy="use inputs of one layout")
    x = torch.cat(feats)
    y = torch.cat([torch.full((len(f),), i, device=x.device) for i, f in enumerate(feats)])
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []), x.device:
        torch.manual_seed(seed)
        router = Router(list(samples), kind, x.shape[1], hidden)
        deviation = x.std(0, correction=0)
        router.mean.copy_(x.mean(0))
        # A feature that hardly varies must not be blown up to noise.
        router.scale.copy_(1 / deviation.clamp_min(1e-3 * float(deviation.max().clamp_min(1e-12))))
        inputs = (x - router.mean) * router.scale
        counts = torch.bincount(y, minlength=len(samples)).float()
        loss = nn.CrossEntropyLoss(weight=counts.sum() / (len(samples) * counts), label_smoothing=0.05)
        optimiser = torch.optim.AdamW(router.layers.parameters(), lr=lr, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
        with torch.enable_grad():
            for _ in range(epochs):
                order = torch.randperm(len(x), device="cpu")
                for begin in range(0, len(x), batch):
                    part = order[begin : begin + batch]
                    optimiser.zero_grad()
                    loss(router.layers(inputs[part]), y[part]).backward()
                    optimiser.step()
                schedule.step()
    return router.eval()


@torch.no_grad()
def evaluate(router: Router, samples: Mapping[str, Tensor]) -> Evaluation:
    """Accuracy and confusion on samples by task; tasks the router does not know are an error."""
    confusion = [[0] * len(router.tasks) for _ in router.tasks]
    for task, x in samples.items():
        if task not in router.tasks:
            raise BadInput(f"the router knows no task {task!r}", remedy=f"it knows {', '.join(router.tasks)}")
        for chosen in router(x).argmax(-1).tolist():
            confusion[router.tasks.index(task)][chosen] += 1
    return Evaluation(list(router.tasks), confusion)


def softmax_mixture(router: Router, x: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """{task: weight} for FreeModel.use: the router's mean probabilities over a batch."""
    with torch.no_grad():
        weights = (router(x) / temperature).softmax(-1).mean(0)
    return dict(zip(router.tasks, weights.tolist(), strict=True))

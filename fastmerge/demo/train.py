"""Training of the demo's networks: one body pretrained on a mixture of all tasks' images, then fine-tuned task by task.

Pretraining sees a few images of every class (with a classifier that is thrown away); what is left is a body whose
features already separate the classes somewhat. A task's head is then frozen: the mean feature of a few of its images
per class. Fine-tuning moves the body only, on all of the task's images, as CLIP's is by its frozen text head.
Everything is drawn from seeds and trains on one thread (see worker): two runs on one machine give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from .tasks import Split, Task
from .vit import Shape, VisionTransformer, logits

Progress = Callable[[str, float], None]  # what is trained, share done in [0, 1]


@dataclass(frozen=True)
class Settings:
    """Everything that the trained networks depend on (with the code and the data)."""

    shape: Shape
    pretrain_steps: int
    finetune_steps: int
    pretrain_rate: float
    batch: int = 64
    pretrain_per_class: int = 4
    head_per_class: int = 16
    finetune_rate: float = 2e-4
    weight_decay: float = 0.05
    seed: int = 0


QUICK = Settings(Shape(width=96, depth=3, heads=4), pretrain_steps=360, finetune_steps=120, pretrain_rate=2e-3)
FULL = Settings(Shape(width=192, depth=4, heads=6), pretrain_steps=500, finetune_steps=220, pretrain_rate=1e-3)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image turned by up to 10°, scaled by 0.9..1.1 and shifted by up to 2 pixels; the border is repeated."""
    n = len(images)
    draw = torch.rand(n, 4, generator=generator).mul_(2).sub_(1)
    angle, zoom = draw[:, 0] * math.radians(10), 1 + 0.1 * draw[:, 1]
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    shift = draw[:, 2:] * (2 / 14)
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(n, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _optimize(
    model: torch.nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    parameters: list[torch.nn.Parameter],
    data: Split,
    steps: int,
    rate: float,
    settings: Settings,
    generator: torch.Generator,
    tell: Callable[[float], None],
) -> None:
    """AdamW, a warm-up of a tenth of the steps, then a cosine down to zero."""
    model.train()
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    warm = max(1, steps // 10)
    step = 0
    while step < steps:
        for images, labels in data.batches(settings.batch, generator):
            if step == steps:
                break
            at = (
                min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)))
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * at
            loss = loss_of(augment(images, generator), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            tell(step / steps)


def pretrain(tasks: Mapping[str, Task], settings: Settings, progress: Progress) -> dict[str, torch.Tensor]:
    """The base: a body trained to tell apart the classes of all tasks from `pretrain_per_class` images of each."""
    generator = torch.Generator().manual_seed(settings.seed)
    model = VisionTransformer(settings.shape)
    model.initialize(generator)
    images, labels, classes = [], [], 0
    for task in tasks.values():
        few = task.train.few(settings.pretrain_per_class)
        images.append(few.images)
        labels.append(few.labels + classes)
        classes += task.classes
    head = torch.nn.Parameter(torch.randn(classes, settings.shape.width, generator=generator))

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits(model(x), functional.normalize(head, dim=1)), y, label_smoothing=0.1)

    mixture = Split(torch.cat(images), torch.cat(labels))
    parameters = [*model.parameters(), head]
    _optimize(
        model, loss_of, parameters, mixture, settings.pretrain_steps, settings.pretrain_rate, settings, generator,
        lambda share: progress("base", share),
    )  # fmt: skip
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def prototypes(base: VisionTransformer, task: Task, per_class: int) -> torch.Tensor:
    """A frozen head [classes, width]: the mean feature of `per_class` training images of each class, of length 1."""
    base.eval()
    few = task.train.few(per_class)
    sums = torch.zeros(task.classes, base.shape.width)
    for images, labels in few.batches(250):
        sums.index_add_(0, labels, base(images))
    return functional.normalize(sums, dim=1)


def finetune(
    base: Mapping[str, torch.Tensor], task: Task, head: torch.Tensor, settings: Settings, progress: Progress
) -> dict[str, torch.Tensor]:
    """The base's body trained on all of the task's training images against its frozen head."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    model = VisionTransformer(settings.shape)
    model.load_state_dict(base)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits(model(x), head), y)

    _optimize(
        model, loss_of, list(model.parameters()), task.train, settings.finetune_steps, settings.finetune_rate, settings,
        generator, lambda share: progress(task.name, share),
    )  # fmt: skip
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

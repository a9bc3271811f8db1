"""A small vision transformer whose state dict has timm's names, so that every per-name rule applies to it as it is.

Images [n, 1, 28, 28] -> features [n, width] of length 1. It has no classifier: a task's head is a frozen matrix of
class prototypes (see train.prototypes), and one body serves every task, as CLIP's image encoder does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

ARCHITECTURE = "FastmergeDemoViT"
SCALE = 16.0  # logits = SCALE · cosine(feature, prototype)


@dataclass(frozen=True)
class Shape:
    """width: of the residual stream, a multiple of heads and of 3."""

    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v)
        out: torch.Tensor = self.proj(x.transpose(1, 2).reshape(n, tokens, width))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width)
        self.attn = Attention(shape.width, shape.heads)
        self.norm2 = nn.LayerNorm(shape.width)
        self.mlp = Mlp(shape.width, shape.mlp_ratio * shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """Three convolutions of stride 2, 28 -> 14 -> 7 -> 4 (early convolutions, arXiv:2106.14881): 16 patches.

    They learn from a few thousand images in seconds what one linear projection of 7×7 patches does not in minutes.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width // 3, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width // 3, 2 * width // 3, 3, stride=2, padding=1)
        self.proj = nn.Conv2d(2 * width // 3, width, 3, stride=2, padding=1)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv2(self.act(self.conv1(x))))
        out: torch.Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class VisionTransformer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 16, shape.width))
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.depth)))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.norm(self.blocks(x))
        return functional.normalize(x.mean(1), dim=-1)

    def initialize(self, generator: torch.Generator) -> None:
        """Weights N(0, 0.02) cut at two deviations, biases 0, from `generator`."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                scale = 0.02 if parameter.ndim == 3 else parameter[0].numel() ** -0.5
                nn.init.trunc_normal_(parameter, std=scale, a=-2 * scale, b=2 * scale, generator=generator)


def logits(features: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """SCALE · cosine of features [n, width] (length 1) and a head [classes, width] (rows of length 1)."""
    return SCALE * features @ head.T


def save_checkpoint(folder: Path, state: Mapping[str, torch.Tensor], shape: Shape) -> None:
    """An ordinary checkpoint directory: config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [ARCHITECTURE], "model_type": "fastmerge_demo_vit", "image_size": 28}
    (folder / "config.json").write_text(
        json.dumps({**config, **asdict(shape), "torch_dtype": "float32"}, indent=2) + "\n"
    )
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint directory that holds one model.safetensors or an index of several shards."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_text())["weight_map"].values())
    return {name: tensor for file in sorted(files) for name, tensor in load_file(str(folder / file)).items()}

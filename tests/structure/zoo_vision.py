"""Tiny vision networks with the tensor names and the arithmetic of timm, torchvision and Hugging Face."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self, sizes=(6, 16, 12, 5)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class VGG(nn.Module):
    def __init__(self, norm=True):
        super().__init__()

        def block(a, b):
            return [nn.Conv2d(a, b, 3, padding=1), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]

        self.features = nn.Sequential(*block(3, 8), *block(8, 12))
        self.classifier = nn.Sequential(nn.Linear(12 * 4, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def norm2d(channels: int, groups: int) -> nn.Module:
    return nn.GroupNorm(groups, channels) if groups else nn.BatchNorm2d(channels)


class Block(nn.Module):
    """torchvision's BasicBlock (expansion 1) and Bottleneck."""

    def __init__(self, inputs, width, outputs, stride, bottleneck, groups):
        super().__init__()
        self.bottleneck = bottleneck
        self.conv1 = nn.Conv2d(
            inputs, width, 1 if bottleneck else 3, 1 if bottleneck else stride, 0 if bottleneck else 1, bias=False
        )
        self.bn1 = norm2d(width, groups)
        self.conv2 = nn.Conv2d(width, width if bottleneck else outputs, 3, stride if bottleneck else 1, 1, bias=False)
        self.bn2 = norm2d(width if bottleneck else outputs, groups)
        if bottleneck:
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = norm2d(outputs, groups)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm2d(outputs, groups))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, bottleneck=False, groups=0, width=8, blocks=(2, 1, 1, 1)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = norm2d(width, groups)
        inputs = width
        for s, count in enumerate(blocks, 1):
            outputs = width * s * (2 if bottleneck else 1)
            layers = []
            for b in range(count):
                layers.append(Block(inputs, width * s, outputs, 2 if s > 1 and b == 0 else 1, bottleneck, groups))
                inputs = outputs
            setattr(self, f"layer{s}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class TimmAttention(nn.Module):
    def __init__(self, dim, heads, window=0):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if window:
            self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
            at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
            near = at[:, :, None] - at[:, None, :] + window - 1
            self.register_buffer("relative_position_index", near[0] * (2 * window - 1) + near[1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if hasattr(self, "relative_position_bias_table"):
            bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(n, n, -1)
            bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class TimmMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TimmBlock(nn.Module):
    def __init__(self, dim, heads, hidden, window=0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = TimmAttention(dim, heads, window), TimmMlp(dim, hidden)
        self.window = window

    def attend(self, x: Tensor) -> Tensor:
        if not self.window:
            return self.attn(x)
        (b, h, w, c), m = x.shape, self.window
        x = x.view(b, h // m, m, w // m, m, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, m * m, c)
        x = self.attn(x).view(b, h // m, w // m, m, m, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch, norm=False):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()


class ViT(nn.Module):
    def __init__(self, dim=24, heads=3, depth=2, distilled=False):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 17 + distilled, dim))
        self.patch_embed = PatchEmbed(dim, 4)
        self.blocks = nn.Sequential(*(TimmBlock(dim, heads, 2 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 5)
        if distilled:
            self.head_dist = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        tokens = [self.cls_token.expand(x.shape[0], -1, -1)]
        if hasattr(self, "dist_token"):
            tokens.append(self.dist_token.expand(x.shape[0], -1, -1))
        x = self.norm(self.blocks(torch.cat([*tokens, x], 1) + self.pos_embed))
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2 if len(tokens) == 2 else self.head(x[:, 0])


class SwinStage(nn.Module):
    def __init__(self, inputs, dim, heads):
        super().__init__()
        self.downsample = nn.Identity()
        if inputs != dim:
            self.downsample = nn.Module()
            self.downsample.norm = nn.LayerNorm(4 * inputs)
            self.downsample.reduction = nn.Linear(4 * inputs, dim, bias=False)
        self.blocks = nn.Sequential(*(TimmBlock(dim, heads, 2 * dim, window=2) for _ in range(1)))

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.downsample, nn.Identity):
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
            x = self.downsample.reduction(self.downsample.norm(x))
        return self.blocks(x)


class Swin(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.patch_embed = PatchEmbed(dim, 2, norm=True)
        self.layers = nn.Sequential(SwinStage(dim, dim, 2), SwinStage(dim, 2 * dim, 4))
        self.norm = nn.LayerNorm(2 * dim)
        self.head = nn.Module()
        self.head.fc = nn.Linear(2 * dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.norm(self.patch_embed.proj(x).permute(0, 2, 3, 1))
        return self.head.fc(self.norm(self.layers(x)).mean((1, 2)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.conv_dw = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = TimmMlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x + y * self.gamma.reshape(1, -1, 1, 1)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, dims=(8, 12)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 2, 2), LayerNorm2d(dims[0]))
        self.stages = nn.Sequential()
        for s, d in enumerate(dims):
            stage = nn.Module()
            down = [LayerNorm2d(dims[s - 1]), nn.Conv2d(dims[s - 1], d, 2, 2)] if s else []
            stage.downsample = nn.Sequential(*down) if s else nn.Identity()
            stage.blocks = nn.Sequential(ConvNeXtBlock(d), ConvNeXtBlock(d))
            self.stages.append(stage)
        self.head = nn.Module()
        self.head.norm, self.head.fc = LayerNorm2d(dims[-1]), nn.Linear(dims[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage.blocks(stage.downsample(x))
        return self.head.fc(self.head.norm(x.mean((2, 3), keepdim=True)).flatten(1))

"""The networks that every spec is tried on: one of each shipped architecture and naming."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo_language import GPT2, Bert, ClipVision, Llama
from zoo_vision import MLP, VGG, ConvNeXt, ResNet, Swin, ViT


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def ids() -> Tensor:
    return torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(1))


# name -> (make the model, example inputs, shipped architecture, options of the spec)
ZOO = {
    "mlp": (MLP, lambda: torch.randn(4, 6), "mlp", {}),
    "vgg": (lambda: VGG(False), lambda: torch.randn(2, 3, 8, 8), "vgg", {}),
    "vgg_bn": (VGG, lambda: torch.randn(2, 3, 8, 8), "vgg", {}),
    "resnet_basic": (ResNet, images, "resnet_basic", {}),
    "resnet_bottleneck": (lambda: ResNet(True), images, "resnet_bottleneck", {}),
    "resnet_basic_gn": (lambda: ResNet(groups=4), images, "resnet_basic_gn", {"norm_groups": 4}),
    "resnet_bottleneck_gn": (lambda: ResNet(True, 4), images, "resnet_bottleneck_gn", {"norm_groups": 4}),
    "vit": (ViT, images, "vit", {"heads": 3}),
    "deit": (lambda: ViT(distilled=True), images, "vit", {"heads": 3}),
    "clip_vit": (ClipVision, images, "clip_vit", {"heads": 3}),
    "swin": (Swin, images, "swin", {}),
    "bert": (Bert, ids, "bert", {"heads": 3}),
    "roberta": (lambda: Bert(roberta=True), ids, "bert", {"heads": 3}),
    "gpt2": (GPT2, ids, "gpt2", {"heads": 3}),
    "llama": (lambda: Llama(kv=6), ids, "llama", {"heads": 6, "kv_heads": 6}),
    "mistral": (Llama, ids, "llama", {"heads": 6, "kv_heads": 2}),
    "qwen2": (lambda: Llama(bias=True), ids, "llama", {"heads": 6, "kv_heads": 2}),
    "convnext": (ConvNeXt, images, "convnext", {}),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """The network with every tensor random (norms and biases too), in eval mode."""
    torch.manual_seed(seed)
    model = ZOO[name][0]()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for n, t in model.state_dict().items():
            if t.is_floating_point() and (t.ndim == 1 or "token" in n):
                noise = torch.randn(t.shape, generator=g) * 0.3
                t.copy_(t.abs() + noise.abs() if n.endswith("running_var") else t + noise)
    return model.eval()

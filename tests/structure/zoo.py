"""Tiny networks with the tensor names and the arithmetic of timm, torchvision and Hugging Face."""

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


class HFAttention(nn.Module):
    """q, k and v apart: CLIP's names by default, or those given."""

    def __init__(self, dim, heads, names=("q_proj", "k_proj", "v_proj")):
        super().__init__()
        self.names, self.num_heads = names, heads
        for n in names:
            setattr(self, n, nn.Linear(dim, dim))

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (
            getattr(self, m)(x).view(b, n, self.num_heads, c // self.num_heads).transpose(1, 2) for m in self.names
        )
        a = torch.softmax(q @ k.transpose(-1, -2) * (c // self.num_heads) ** -0.5, -1)
        return (a @ v).transpose(1, 2).reshape(b, n, c)


class ClipAttention(HFAttention):
    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.attend(x))


class ClipLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.self_attn = ClipAttention(dim, heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = TimmMlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipVision(nn.Module):
    def __init__(self, dim=24, heads=3):
        super().__init__()
        v = self.vision_model = nn.Module()
        v.embeddings = nn.Module()
        v.embeddings.class_embedding = nn.Parameter(torch.randn(dim))
        v.embeddings.patch_embedding = nn.Conv2d(3, dim, 4, 4, bias=False)
        v.embeddings.position_embedding = nn.Embedding(17, dim)
        v.embeddings.register_buffer("position_ids", torch.arange(17)[None], persistent=False)
        v.pre_layrnorm = nn.LayerNorm(dim)
        v.encoder = nn.Module()
        v.encoder.layers = nn.ModuleList(ClipLayer(dim, heads) for _ in range(2))
        v.post_layernorm = nn.LayerNorm(dim)
        self.visual_projection = nn.Linear(dim, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = self.vision_model
        e = v.embeddings
        x = e.patch_embedding(x).flatten(2).transpose(1, 2)
        x = torch.cat([e.class_embedding.expand(x.shape[0], 1, -1), x], 1) + e.position_embedding(e.position_ids)
        x = v.pre_layrnorm(x)
        for layer in v.encoder.layers:
            x = layer(x)
        return self.visual_projection(v.post_layernorm(x[:, 0]))


def residual_output(dim, inputs):
    m = nn.Module()
    m.dense, m.LayerNorm = nn.Linear(inputs, dim), nn.LayerNorm(dim)
    return m


class BertLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = HFAttention(dim, heads, ("query", "key", "value"))
        self.attention.output = residual_output(dim, dim)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(dim, 2 * dim)
        self.output = residual_output(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        a = self.attention
        x = a.output.LayerNorm(a.output.dense(a.self.attend(x)) + x)
        return self.output.LayerNorm(self.output.dense(F.gelu(self.intermediate.dense(x))) + x)


class Bert(nn.Module):
    """BertForSequenceClassification, or with roberta=True the RoBERTa one."""

    def __init__(self, dim=24, heads=3, roberta=False):
        super().__init__()
        body = nn.Module()
        body.embeddings = nn.Module()
        body.embeddings.word_embeddings = nn.Embedding(20, dim)
        body.embeddings.position_embeddings = nn.Embedding(9, dim)
        body.embeddings.token_type_embeddings = nn.Embedding(2, dim)
        body.embeddings.LayerNorm = nn.LayerNorm(dim)
        body.encoder = nn.Module()
        body.encoder.layer = nn.ModuleList(BertLayer(dim, heads) for _ in range(2))
        if roberta:
            self.roberta = body
            self.classifier = nn.Module()
            self.classifier.dense, self.classifier.out_proj = nn.Linear(dim, dim), nn.Linear(dim, 3)
        else:
            body.pooler = nn.Module()
            body.pooler.dense = nn.Linear(dim, dim)
            self.bert = body
            self.classifier = nn.Linear(dim, 3)

    def forward(self, ids: Tensor) -> Tensor:
        body = self.roberta if hasattr(self, "roberta") else self.bert
        e = body.embeddings
        at = torch.arange(ids.shape[1])
        x = e.LayerNorm(
            e.word_embeddings(ids) + e.position_embeddings(at) + e.token_type_embeddings(torch.zeros_like(ids))
        )
        for layer in body.encoder.layer:
            x = layer(x)
        if hasattr(self, "roberta"):
            return self.classifier.out_proj(torch.tanh(self.classifier.dense(x[:, 0])))
        return self.classifier(torch.tanh(body.pooler.dense(x[:, 0])))


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is [in, out]."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.2)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class GPT2Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.num_heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = Conv1D(3 * dim, dim), Conv1D(dim, dim)
        self.mlp.c_fc, self.mlp.c_proj = Conv1D(2 * dim, dim), Conv1D(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.attn.c_attn(self.ln_1(x)).split(c, 2)
        q, k, v = (t.view(b, n, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, c)
        x = x + self.attn.c_proj(y)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class GPT2(nn.Module):
    """GPT2LMHeadModel; the output projection is the embedding."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        t = self.transformer = nn.Module()
        t.wte, t.wpe = nn.Embedding(20, dim), nn.Embedding(9, dim)
        t.h = nn.ModuleList(GPT2Block(dim, heads) for _ in range(2))
        t.ln_f = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, 20, bias=False)
        self.lm_head.weight = t.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        t = self.transformer
        x = t.wte(ids) + t.wpe(torch.arange(ids.shape[1]))
        for block in t.h:
            x = block(x)
        return self.lm_head(t.ln_f(x))


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaLayer(nn.Module):
    def __init__(self, dim, heads, kv, bias):
        super().__init__()
        d = self.head = dim // heads
        self.kv, self.repeat = kv, heads // kv
        a, m = nn.Module(), nn.Module()
        a.q_proj, a.k_proj = nn.Linear(dim, heads * d, bias=bias), nn.Linear(dim, kv * d, bias=bias)
        a.v_proj, a.o_proj = nn.Linear(dim, kv * d, bias=bias), nn.Linear(heads * d, dim, bias=False)
        m.gate_proj, m.up_proj = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        m.down_proj = nn.Linear(2 * dim, dim, bias=False)
        self.self_attn, self.mlp = a, m
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(dim), RMSNorm(dim)

    def rotate(self, x: Tensor) -> Tensor:
        half = self.head // 2
        angle = torch.arange(x.shape[2])[:, None] * 100.0 ** -(torch.arange(half) / half)
        cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        a, y = self.self_attn, self.input_layernorm(x)
        q, k, v = (f(y).view(b, n, -1, self.head).transpose(1, 2) for f in (a.q_proj, a.k_proj, a.v_proj))
        q, k = self.rotate(q), self.rotate(k)
        k, v = (t[:, :, None].expand(-1, -1, self.repeat, -1, -1).reshape(b, -1, n, self.head) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a.o_proj(y.transpose(1, 2).reshape(b, n, -1))
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


class Llama(nn.Module):
    """LlamaForCausalLM; bias=True gives Qwen2's, kv < heads Mistral's grouping."""

    def __init__(self, dim=24, heads=6, kv=2, bias=False):
        super().__init__()
        m = self.model = nn.Module()
        m.embed_tokens = nn.Embedding(20, dim)
        m.layers = nn.ModuleList(LlamaLayer(dim, heads, kv, bias) for _ in range(2))
        m.norm = RMSNorm(dim)
        self.lm_head = nn.Linear(dim, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


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

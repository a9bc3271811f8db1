"""Tiny transformers with the tensor names and the arithmetic of Hugging Face: CLIP's vision tower, BERT, GPT-2, Llama."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_vision import TimmMlp


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

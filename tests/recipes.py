"""Recipes for tests: texts that name the method `probe` (tests/engine/conftest.py), and a Llama's tensors."""

from __future__ import annotations

from fastmerge import Recipe

LLAMA = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{s}.weight" for i in range(5) for s in ("self_attn.q_proj", "mlp.down_proj")),
    "model.norm.weight",
    "lm_head.weight",
]
HEAD = "merge_method: probe\nbase_model: b\nmodels:\n- model: a\n  parameters: {weight: 1}\n"


def parse(text: str) -> Recipe:
    return Recipe.parse(text, source="r.yml")

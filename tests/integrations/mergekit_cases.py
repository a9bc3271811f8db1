"""The models and recipes of the parity fixture: what make_mergekit_golden.py runs and test_mergekit_golden.py checks.

Everything is float32: mergekit computes in the storage dtype, fastmerge in float32, and the two must agree where those
are the same. No last slice here has more sources than the first: mergekit 0.1.5 leaves the surplus out of the final norm
and the head, which fastmerge does not.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, WIDE, VOCABULARY = 4, 8, 12, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
}  # fmt: skip

_THREE = "models: [{{model: {a}}}, {{model: {b}}}, {{model: {c}}}]\n"
CASES = {
    "linear": """
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.3}}}}
  - {{model: {b}, parameters: {{weight: 0.9}}}}
  - {{model: {c}, parameters: {{weight: -0.2}}}}
""",
    "linear, gradients and filters, not normalised": """
merge_method: linear
models:
  - model: {a}
    parameters: {{weight: [0, 1, 0.25]}}
  - model: {b}
    parameters:
      weight:
        - {{filter: mlp, value: [1, 0]}}
        - {{filter: self_attn.q_proj, value: 0.7}}
        - {{filter: embed, value: 0.1}}
        - {{value: [0.5, 2]}}
parameters: {{normalize: false}}
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {base}}}
  - {{model: {a}, parameters: {{weight: 0.3}}}}
  - {{model: {b}, parameters: {{weight: 0.4}}}}
""",
    "task_arithmetic, normalised, lambda by filter": """
merge_method: task_arithmetic
base_model: {base}
"""
    + _THREE
    + """
parameters:
  weight: [0.2, 0.9]
  normalize: true
  lambda: [{{filter: mlp, value: 0.5}}, {{filter: "*", value: [1, 1.5, 0]}}]
""",
    "task_arithmetic, slices": """
merge_method: task_arithmetic
base_model: {base}
slices:
  - sources:
      - {{model: {base}, layer_range: [0, 3]}}
      - {{model: {a}, layer_range: [0, 3], parameters: {{weight: [0, 1]}}}}
      - {{model: {c}, layer_range: [0, 3], parameters: {{weight: -0.3}}}}
  - sources:
      - {{model: {base}, layer_range: [1, 4]}}
      - {{model: {b}, layer_range: [0, 3]}}
      - {{model: {c}, layer_range: [1, 4], parameters: {{weight: 0.6}}}}
    parameters:
      weight: [{{filter: layers.1., value: 0.75}}, {{value: [0.1, 0.2]}}]
      lambda: [{{filter: layers.4., value: 0.5}}, {{value: 1}}]
""",
    "task_arithmetic, every level": """
merge_method: task_arithmetic
base_model: {base}
modules:
  default:
    slices:
      - sources:
          - {{model: {base}, layer_range: [0, 4]}}
          - {{model: {a}, layer_range: [0, 4], parameters: {{weight: [{{filter: mlp, value: 0.1}}]}}}}
          - {{model: {b}, layer_range: [0, 4]}}
        parameters: {{weight: [{{filter: self_attn, value: 0.2}}]}}
    parameters: {{weight: [{{filter: norm, value: 0.3}}]}}
parameters: {{weight: 0.4, lambda: 2}}
""",
    "linear, a slice of one layer": """
merge_method: linear
slices:
  - sources:
      - {{model: {a}, layer_range: [0, 1], parameters: {{weight: [3, 5]}}}}
      - {{model: {b}, layer_range: [3, 4], parameters: {{weight: 2}}}}
  - sources:
      - {{model: {c}, layer_range: [1, 3], parameters: {{weight: 1}}}}
parameters: {{normalize: false}}
""",
    "ties": """
merge_method: ties
base_model: {base}
"""
    + _THREE
    + """
parameters: {{weight: 1, density: 0.3}}
""",
    "ties, per model, gradients, not normalised": """
merge_method: ties
base_model: {base}
models:
  - {{model: {a}, parameters: {{weight: 0.5, density: [1, 0.2]}}}}
  - {{model: {b}, parameters: {{weight: [0.1, 0.9], density: [{{filter: mlp, value: 0.25}}, {{value: 0.6}}]}}}}
  - {{model: {c}, parameters: {{weight: 1.5}}}}
parameters: {{density: 0.45, normalize: false, lambda: 0.7, int8_mask: true}}
""",
    "ties, slices": """
merge_method: ties
base_model: {base}
slices:
  - sources:
      - {{model: {base}, layer_range: [0, 4]}}
      - {{model: {a}, layer_range: [0, 4], parameters: {{weight: [0.3, 1]}}}}
      - {{model: {b}, layer_range: [0, 4], parameters: {{weight: 0.5}}}}
  - sources:
      - {{model: {base}, layer_range: [2, 4]}}
      - {{model: {c}, layer_range: [2, 4], parameters: {{weight: 1}}}}
parameters: {{density: [0.2, 0.8], normalize: true}}
""",
    "sce": """
merge_method: sce
base_model: {base}
"""
    + _THREE,
    "sce, the elements that vary most": """
merge_method: sce
base_model: {base}
"""
    + _THREE
    + """
parameters: {{select_topk: 0.3}}
""",
    "ram": """
merge_method: ram
base_model: {base}
"""
    + _THREE
    + """
parameters: {{epsilon: 0.1}}
""",
    "ramplus_tl": """
merge_method: ramplus_tl
base_model: {base}
"""
    + _THREE
    + """
parameters: {{epsilon: 0.1, r: 0.5, alpha: 2}}
""",
    "arcee_fusion": """
merge_method: arcee_fusion
base_model: {base}
models: [{{model: {a}}}]
""",
}


def write_models(folder: Path) -> dict[str, str]:
    """base and three fine-tunes, the same bits on every machine; their paths by placeholder."""
    base = _state(0, 1.0)
    states = {"base": base} | {
        name: {k: v + d for (k, v), d in zip(base.items(), _state(seed, 0.1).values(), strict=True)}
        for seed, name in enumerate("abc", 1)
    }
    for name, state in states.items():
        (folder / name).mkdir(parents=True)
        save_file(state, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    return {name: str(folder / name) for name in states}


def _state(seed: int, scale: float) -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(seed))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.{i}.{n}.weight": s for i in range(LAYERS) for n, s in _SHAPES.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {n: (generator.standard_normal(s, dtype=np.float32) * np.float32(scale)) for n, s in shapes.items()}

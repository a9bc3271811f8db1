"""Which shipped spec a model has: by name or by its tensor names, numbers of heads from the model itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import BadInput
from .architectures import detect, load
from .permutation import PermutationSpec


def state_of(model: Any, label: str = "model") -> Mapping[str, Tensor]:
    """The state dict of a module, or the mapping itself; raises BadInput for anything else."""
    if isinstance(model, nn.Module):
        return model.state_dict()
    if isinstance(model, Mapping):
        return model
    raise BadInput(
        f"{label} must be an nn.Module or a state dict, not {type(model).__name__}",
        remedy="load a checkpoint first (safetensors.torch.load_file), or run `fastmerge align` on the folders"
        if isinstance(model, (str, os.PathLike))
        else "pass the module, or its state_dict()",
    )


# What a config calls them: Hugging Face's names, GPT-2's, timm's; the last of each is our own.
_IN_CONFIG = {
    "heads": ("num_attention_heads", "n_head", "num_heads", "heads"),
    "kv_heads": ("num_key_value_heads", "kv_heads"),
    "norm_groups": ("norm_groups",),
}


def heads_in_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of heads that a config.json tells, its vision or text part included (CLIP); only whole numbers count."""
    out: dict[str, Any] = {}
    parts = [config, *(config.get(k) for k in ("vision_config", "text_config"))]
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        for key, names in _IN_CONFIG.items():
            for name in names:
                if key not in out and type(part.get(name)) is int:
                    out[key] = part[name]
    return out


def heads_of(model: Any) -> dict[str, Any]:
    """Numbers of heads, from a Hugging Face config or from the attributes of attention modules."""
    config = getattr(model, "config", None)
    told = getattr(config, "to_dict", None)
    found_in = told() if callable(told) else getattr(config, "__dict__", {})
    out = heads_in_config(found_in)
    if "heads" not in out and isinstance(model, nn.Module):
        found = {m.num_heads for m in model.modules() if isinstance(getattr(m, "num_heads", None), int)}
        if len(found) == 1:
            out["heads"] = found.pop()
    groups = (
        {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} if isinstance(model, nn.Module) else ()
    )
    if len(groups) == 1:
        out["norm_groups"] = groups.pop()
    return out


def named_spec(architecture: str | None, model: Any, **options: Any) -> PermutationSpec:
    """The shipped spec of an architecture for a model or state dict.

    Args:
        architecture: a name from :func:`architectures`, or None to recognise it by the names of the tensors.
        options: ``heads``, ``kv_heads``, ``norm_groups`` where they can not be read off the model.

    Raises: BadInput for an unknown architecture, tensors that do not fit, or an option that is missing.
    """
    shapes = {k: tuple(v.shape) for k, v in state_of(model).items()}
    given = {**heads_of(model), **options}
    return detect(shapes, **given) if architecture is None else load(architecture, shapes, **given)

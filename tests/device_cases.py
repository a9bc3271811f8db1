"""Merges that run on a device, real or fake, and must give the CPU's bytes (class C: its values within tolerance)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from checkpoints import near, save, tiny_state


class DeviceCase(NamedTuple):
    method: str
    parameters: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    models: int = 3
    base: bool = True
    exact: bool = True  # the same bits on the hardware too
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # of base and models, in turn
    extra: dict[str, Any] = {}  # noqa: RUF012


W = {"weight": 0.5}
CASES = {
    "linear": DeviceCase("linear", W, base=False),
    "task_arithmetic": DeviceCase("task_arithmetic", {**W, "lambda": 0.7}),
    "task_arithmetic, mixed dtypes": DeviceCase(
        "task_arithmetic", W, dtypes=(torch.float32, torch.bfloat16, torch.float16), extra={"out_dtype": "bfloat16"}
    ),
    "task_arithmetic, float64": DeviceCase("task_arithmetic", W, models=2, dtypes=(torch.float32, torch.float64)),
    "ties, bfloat16": DeviceCase("ties", {**W, "density": 0.4}, dtypes=(torch.bfloat16,)),
    "ties over the model": DeviceCase("ties", {**W, "density": 0.3, "scope": "model"}),
    "dare_ties": DeviceCase("dare_ties", {**W, "density": 0.5}),
    "breadcrumbs": DeviceCase("breadcrumbs", {**W, "density": 0.6, "gamma": 0.1}),
    "della": DeviceCase("della", {**W, "density": 0.5, "epsilon": 0.2}),
    "slerp": DeviceCase("slerp", {"t": 0.3}, models=1),
    "nuslerp": DeviceCase("nuslerp", W, models=2),
    "karcher": DeviceCase("karcher", {}, base=False),
    "model_stock": DeviceCase("model_stock", {}),
    "nearswap": DeviceCase("nearswap", {"t": 0.05}, models=1),
    "sce": DeviceCase("sce", {"select_topk": 0.4}),
    "ramplus_tl": DeviceCase("ramplus_tl", {"alpha": 2.0}),
    "arcee_fusion": DeviceCase("arcee_fusion", {}, models=1),
    "passthrough": DeviceCase("passthrough", {}, models=1, base=False, dtypes=(torch.bfloat16,)),
    "fr": DeviceCase("fr", {}, exact=False),
    "fr, select": DeviceCase("fr", {"select": "mlp"}, exact=False, dtypes=(torch.bfloat16,)),
}


def write_case(folder: Path, case: DeviceCase, *, shards: int = 2) -> Path:
    """Checkpoints and the recipe of a case; returns the recipe's path."""
    dtypes = [case.dtypes[i % len(case.dtypes)] for i in range(case.models + 1)]

    def cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}

    base = tiny_state(0)
    states = [base, *(near(base, i + 1) for i in range(case.models))]
    folders = [
        save(folder / name, cast(state, dtype), shards=shards)
        for name, state, dtype in zip("abcdefg", states, dtypes, strict=False)
    ]
    per_model = {k: v for k, v in case.parameters.items() if k in ("weight", "density", "gamma", "epsilon")}
    data = {
        "merge_method": case.method,
        "models": [{"model": str(f), "parameters": per_model} for f in folders[1:]],
        "parameters": {k: v for k, v in case.parameters.items() if k not in per_model},
        **({"base_model": str(folders[0])} if case.base else {}),
        **case.extra,
    }
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(data))
    return path

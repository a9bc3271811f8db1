"""The merge methods as a user writes them: PyTorch on whole tensors, everything in memory.

python -m fastmerge.benchmarks.merges.plain METHOD PARAMETERS(json) OUT BASE MODEL...

Loads every model, merges name by name in float32, writes one file. Written from the papers' and docs' formulas, apart from
fastmerge's operators; in float64 the same functions are what both programs are compared with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Any]
Merge = Callable[[Tensor, list[Tensor], Parameters], Tensor]


def linear(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    return torch.stack(models).mean(0)


def passthrough(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    return models[0]


def _scatter(delta: Tensor, index: Tensor) -> Tensor:
    keep = torch.zeros(delta.numel(), dtype=torch.bool)
    keep[index] = True
    return torch.where(keep.view(delta.shape), delta, 0)


def _largest(delta: Tensor, p: Parameters) -> Tensor:
    return _scatter(delta, delta.abs().flatten().topk(max(1, int(p["density"] * delta.numel()))).indices)


def _window(delta: Tensor, p: Parameters) -> Tensor:
    n = delta.numel()
    keep, top = int(p["density"] * n), int(p.get("gamma", 0.01) * n)
    bottom = max(0, n - keep - top)
    return _scatter(delta, delta.abs().flatten().argsort()[bottom : bottom + keep])


def _rescaled(delta: Tensor, kept: Tensor) -> Tensor:
    return kept * (delta.abs().sum() / kept.abs().sum()) if kept.abs().sum() > 0 else kept


def _dropped(delta: Tensor, p: Parameters) -> Tensor:
    return _rescaled(delta, delta * torch.bernoulli(torch.full_like(delta, p["density"])))


def _dropped_by_rank(delta: Tensor, p: Parameters) -> Tensor:
    epsilon, rows = p.get("epsilon", 0.15), delta.reshape(-1, delta.shape[-1])
    ranks = rows.abs().argsort(-1).argsort(-1).to(delta.dtype) / max(1, rows.shape[-1] - 1)
    keep = torch.bernoulli(p["density"] - epsilon + 2 * epsilon * ranks).view(delta.shape)
    return _rescaled(delta, delta * keep)


def _task(
    trim: Callable[[Tensor, Parameters], Tensor] | None = None, *, elect: bool = False, normalize: bool = False
) -> Merge:
    def merge(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
        deltas = torch.stack([(m - base) if trim is None else trim(m - base, p) for m in models]) * p["weight"]
        divisor = torch.tensor(p["weight"] * len(models))
        if elect:
            majority = torch.where(deltas.sum(0) >= 0, 1, -1)
            agrees = deltas.sign() == majority
            deltas, divisor = deltas * agrees, agrees.sum(0) * p["weight"]
        total = deltas.sum(0)
        return base + (total / torch.where(divisor == 0, 1, divisor) if normalize else total)

    return merge


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    cos = (a * b).sum() / (a.norm() * b.norm())
    if cos.abs() > 0.9995:
        return (1 - t) * a + t * b
    phi = cos.acos()
    return ((1 - t) * phi).sin() / phi.sin() * a + (t * phi).sin() / phi.sin() * b


def slerp(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    return _between(base, models[0], p["t"])


def nuslerp(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    a, b = models
    phi = ((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1).acos()
    return (0.5 * phi).sin() / phi.sin() * (a + b)


def multislerp(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    units = [m / m.norm() for m in models]
    mean = torch.stack(units).mean(0)
    mean = mean / mean.norm()
    step = torch.stack([u - (u * mean).sum() * mean for u in units]).mean(0)
    length = torch.stack([m.norm() for m in models]).mean()
    return (mean * step.norm().cos() + step * step.norm().sin() / step.norm().clamp(min=1e-12)) * length


def karcher(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    units = [m / m.norm() for m in models]
    mean = torch.stack(units).mean(0)
    mean = mean / mean.norm()
    for _ in range(10):
        step = torch.zeros_like(mean)
        for u in units:
            cos = (u * mean).sum().clamp(-1, 1)
            if cos.acos() > 1e-5:
                step += cos.acos() / cos.acos().sin() * (u - cos * mean) / len(units)
        size = step.norm()
        if size < 1e-5:
            break
        mean = mean * size.cos() + step * size.sin() / size
        mean = mean / mean.norm()
    return mean * torch.stack([m.norm() for m in models]).mean()


def model_stock(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    deltas, n = [m - base for m in models], len(models)
    cosines = [(a * b).sum() / (a.norm() * b.norm()) for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    c = torch.stack(cosines).mean()
    t = n * c / (1 + (n - 1) * c)
    return t * torch.stack(models).mean(0) + (1 - t) * base


def nearswap(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    share = (p["t"] / (base - models[0]).abs().clamp(min=1e-6)).clamp(0, 1)
    return share * models[0] + (1 - share) * base


def sce(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    deltas = torch.stack([m - base for m in models])
    spread = deltas.var(0, unbiased=False)
    k = int(p["select_topk"] * spread.count_nonzero())
    deltas = torch.stack([_scatter(d, spread.flatten().topk(k).indices) for d in deltas])
    energy = deltas.square().flatten(1).mean(1)
    # mergekit's guard, in its own terms: so small a sum counts as nothing
    weight = torch.full_like(energy, 1 / len(models)) if energy.sum() < 1e-6 else energy / energy.sum()
    weight = weight.view(-1, *[1] * base.ndim)
    agrees = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1, -1)
    return base + (deltas * weight * agrees).sum(0) / (weight * agrees).sum(0).clamp(min=1e-6)


def _alone(deltas: Tensor, factors: Tensor) -> Tensor:
    changed = deltas.abs() > 1e-5
    count = changed.sum(0)
    return (deltas * changed * torch.where(count == 1, factors.view(-1, *[1] * (deltas.ndim - 1)), 1)).sum(
        0
    ) / count.clamp(min=1)


def ram(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    deltas = torch.stack([m - base for m in models])
    return base + _alone(deltas, torch.ones(len(models), dtype=base.dtype))


def ramplus_tl(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    deltas = torch.stack([m - base for m in models])
    changed = (deltas.abs() > 1e-5).flatten(1)
    alone = changed & (changed.sum(0) == 1)
    ratio = (changed.sum(1) - alone.sum(1)).to(base.dtype) / alone.sum(1).clamp(min=1e-5)
    return base + _alone(deltas, 1 + 0.1 * ratio.clamp(0, 0.2))


def arcee_fusion(base: Tensor, models: list[Tensor], p: Parameters) -> Tensor:
    delta = models[0] - base
    a, b = models[0].softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    importance = delta.abs() * (a * (a / b).log()).sum(-1, keepdim=True)
    ordered = importance.flatten().sort().values
    q1, q2, q3 = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    return base + delta * (importance >= q2 + 1.5 * (q3 - q1))


MERGES: dict[str, Merge] = {
    "linear": linear, "passthrough": passthrough, "slerp": slerp, "nuslerp": nuslerp, "multislerp": multislerp,
    "karcher": karcher, "model_stock": model_stock, "nearswap": nearswap, "sce": sce, "ram": ram, "ramplus_tl": ramplus_tl,
    "arcee_fusion": arcee_fusion, "task_arithmetic": _task(), "ties": _task(_largest, elect=True, normalize=True),
    "dare_linear": _task(_dropped), "dare_ties": _task(_dropped, elect=True), "breadcrumbs": _task(_window),
    "breadcrumbs_ties": _task(_window, elect=True), "della_linear": _task(_dropped_by_rank),
    "della": _task(_dropped_by_rank, elect=True, normalize=True),
}  # fmt: skip


def state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def main(arguments: Sequence[str]) -> None:
    from safetensors.torch import save_file

    method, parameters, out, base, *models = arguments
    origin, others = state(Path(base)), [state(Path(m)) for m in models]
    merged = {
        name: MERGES[method](t.float(), [o[name].float() for o in others], json.loads(parameters)).to(t.dtype)
        for name, t in origin.items()
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    save_file(merged, Path(out) / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1:])

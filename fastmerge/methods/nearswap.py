from __future__ import annotations

import torch
from torch import Tensor

from ._method import Models, Weight, method


@method(models=(1, 1), grain="element")
def nearswap(base: Weight, models: Models, *, t: float) -> Weight:
    """Move towards the other model most where the two are near: s = clamp(t / max(|θ₀ − θ₁|, 1e-6), 0, 1)."""
    other = models[0]
    wide = torch.float64 if torch.float64 in (base.dtype, other.dtype) else torch.float32
    a, b = base.to(wide), other.to(wide)
    share: Tensor = (t / (a - b).abs().clamp(min=1e-6)).clamp(0.0, 1.0)
    return share * b + (1.0 - share) * a

import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def stacked(base, models, epsilon=1e-5):  # type: ignore[no-untyped-def]
    """What a user writes."""
    changed = torch.stack([(m - base).float() for m in models]).abs() > epsilon
    alone = changed.sum(0) == 1
    return torch.stack([torch.stack([(c & alone).sum(), (c & ~alone).sum()]) for c in changed])


def _make(device):  # type: ignore[no-untyped-def]
    return (*family(4, 4096, 4096, dtype=torch.bfloat16, device=device), 1e-3), {}


BENCH = Bench(
    "ram_counts",
    (Variant("4 x bf16 4096x4096", _make, bytes=5 * 2 * N, flops=24 * N),),
    {"torch": stacked},
)

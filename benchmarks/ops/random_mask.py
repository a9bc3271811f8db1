import torch

from ..declare import Bench, Variant, randn

N = 4096 * 4096


def bernoulli(x, density, *, epsilon=0.0, seed=0, **_):  # type: ignore[no-untyped-def]
    """What a user writes: torch.bernoulli; by rank with two sorts."""
    g = torch.Generator(device=x.device).manual_seed(seed)
    if epsilon == 0.0:
        return torch.rand(x.shape, generator=g, device=x.device) < density
    ranks = x.abs().argsort(dim=-1).argsort(dim=-1).float() / (x.shape[-1] - 1)
    return torch.bernoulli(density - epsilon + 2 * epsilon * ranks, generator=g).bool()


def _case(**kwargs):  # type: ignore[no-untyped-def]
    return lambda device: ((randn(4096, 4096, device=device), 0.4), {"seed": 1, "name": "w", **kwargs})


BENCH = Bench(
    "random_mask",
    (
        Variant("4096x4096 uniform", _case(), bytes=N),
        Variant("fp32 4096x4096 by rank", _case(epsilon=0.1), bytes=5 * N),
    ),
    {"torch": bernoulli},
)

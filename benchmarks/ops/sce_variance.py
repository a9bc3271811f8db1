import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def stacked(base, models):  # type: ignore[no-untyped-def]
    """What a user writes."""
    return torch.stack([(m - base).float() for m in models]).var(0, correction=0)


def _case(dtype):  # type: ignore[no-untyped-def]
    return lambda device: (family(4, 4096, 4096, dtype=dtype, device=device), {})


BENCH = Bench(
    "sce_variance",
    (
        Variant("4 x bf16 4096x4096", _case(torch.bfloat16), bytes=(5 * 2 + 4) * N, flops=24 * N),
        Variant("4 x fp32 4096x4096", _case(torch.float32), bytes=6 * 4 * N, flops=24 * N, quick=False),
    ),
    {"torch": stacked},
)

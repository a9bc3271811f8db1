import torch

from fastmerge.ops import arcee_divergence

from ..declare import Bench, Variant, family

N = 4096 * 4096


def product(base, other, divergence):  # type: ignore[no-untyped-def]
    """What a user writes."""
    return (other - base).abs() * divergence[:, None]


def _case(dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, (other,) = family(1, 4096, 4096, dtype=dtype, device=device)
        return (base, other, arcee_divergence(base, other)), {}

    return make


BENCH = Bench(
    "arcee_importance",
    (
        Variant("bf16 4096x4096", _case(torch.bfloat16), bytes=(2 * 2 + 4) * N, flops=2 * N),
        Variant("fp32 4096x4096", _case(torch.float32), bytes=3 * 4 * N, flops=2 * N, quick=False),
    ),
    {"torch": product},
)

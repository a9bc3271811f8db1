import torch

from fastmerge.ops import arcee_divergence

from ..declare import Bench, Variant, family

N = 4096 * 4096


def selected(base, other, divergence, threshold, **_):  # type: ignore[no-untyped-def]
    """What a user writes."""
    delta = other - base
    return base + torch.where(delta.abs() * divergence[:, None] >= threshold, delta, 0)


def _case(dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, (other,) = family(1, 4096, 4096, dtype=dtype, device=device)
        divergence = arcee_divergence(base, other)
        return (base, other, divergence, 0.004 * float(divergence.mean())), {"out": torch.empty_like(base)}

    return make


BENCH = Bench(
    "arcee_merge",
    (
        Variant("bf16 4096x4096", _case(torch.bfloat16), bytes=3 * 2 * N, flops=3 * N),
        Variant("fp32 4096x4096", _case(torch.float32), bytes=3 * 4 * N, flops=3 * N, quick=False),
    ),
    {"torch": selected},
)

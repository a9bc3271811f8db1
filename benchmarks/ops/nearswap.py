import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def interpolated(base, other, t, **_):  # type: ignore[no-untyped-def]
    """What a user writes."""
    share = (t / (base - other).abs().clamp(min=1e-6)).clamp(0, 1)
    return torch.lerp(base, other, share)


def _case(dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, (other,) = family(1, 4096, 4096, dtype=dtype, device=device)
        return (base, other, 1e-3), {"out": torch.empty_like(base)}

    return make


BENCH = Bench(
    "nearswap",
    (
        Variant("bf16 4096x4096", _case(torch.bfloat16), bytes=3 * 2 * N, flops=7 * N),
        Variant("fp32 4096x4096", _case(torch.float32), bytes=3 * 4 * N, flops=7 * N, quick=False),
    ),
    {"torch": interpolated},
)

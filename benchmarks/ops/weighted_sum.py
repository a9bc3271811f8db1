import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def plain_torch(base, models, weight, **_):  # type: ignore[no-untyped-def]
    """What a user writes: stack the deltas, weigh, sum, add."""
    deltas = torch.stack([m - base for m in models])
    w = torch.tensor(weight, dtype=base.dtype, device=base.device).view(-1, *[1] * base.ndim)
    return base + (deltas * w).sum(0)


def _case(dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, models = family(4, 4096, 4096, dtype=dtype, device=device)
        # `out` is given, so that the kernel is timed and not the first touch of fresh pages.
        return (base, models, [0.3, 0.2, 0.4, 0.1]), {"out": torch.empty_like(base)}

    return make


BENCH = Bench(
    "weighted_sum",
    (
        Variant("base + 4 x bf16 4096x4096", _case(torch.bfloat16), bytes=6 * 2 * N, flops=12 * N),
        Variant("base + 4 x fp32 4096x4096", _case(torch.float32), bytes=6 * 4 * N, flops=12 * N),
        Variant("base + 4 x fp16 4096x4096", _case(torch.float16), bytes=6 * 2 * N, flops=12 * N, quick=False),
    ),
    {"torch": plain_torch},
)

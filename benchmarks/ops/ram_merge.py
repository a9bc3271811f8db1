import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def stacked(base, models, factor=1.0, epsilon=1e-5, **_):  # type: ignore[no-untyped-def]
    """What a user writes."""
    deltas = torch.stack([(m - base).float() for m in models])
    changed = deltas.abs() > epsilon
    count = changed.sum(0)
    scaled = torch.where(count == 1, deltas * factor, deltas) * changed
    return (base + scaled.sum(0) / count.clamp(min=1)).to(base.dtype)


def _case(dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, models = family(4, 4096, 4096, dtype=dtype, device=device)
        return (base, models, 1.1, 1e-3), {"out": torch.empty_like(base)}

    return make


BENCH = Bench(
    "ram_merge",
    (
        Variant("4 x bf16 4096x4096", _case(torch.bfloat16), bytes=6 * 2 * N, flops=32 * N),
        Variant("4 x fp32 4096x4096", _case(torch.float32), bytes=6 * 4 * N, flops=32 * N, quick=False),
    ),
    {"torch": stacked},
)

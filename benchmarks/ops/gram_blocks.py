import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def dots(base, models):  # type: ignore[no-untyped-def]
    """What a user writes: every pair of flattened deltas by torch.dot."""
    deltas = [(m - base).float().flatten() for m in models]
    return [torch.dot(a, b) for i, a in enumerate(deltas) for b in deltas[i:]]


def _case(dtype):  # type: ignore[no-untyped-def]
    return lambda device: (family(4, 4096, 4096, dtype=dtype, device=device), {})


BENCH = Bench(
    "gram_blocks",
    (
        Variant("base + 4 x bf16 4096x4096", _case(torch.bfloat16), bytes=5 * 2 * N, flops=20 * N),
        Variant("base + 4 x fp32 4096x4096", _case(torch.float32), bytes=5 * 4 * N, flops=20 * N),
    ),
    {"torch": dots},
)

import torch

from ..declare import Bench, Variant, randn

N = 4096 * 4096
KEPT = N // 100


def index_add(x, index, value, *, scale=1.0, mode="add", check=True):  # type: ignore[no-untyped-def]
    """What a user writes: save, then index_add_."""
    flat = x.view(-1)
    saved = flat[index]
    flat.index_add_(0, index, value.to(x.dtype), alpha=scale)
    return saved


def _case(dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        g = torch.Generator().manual_seed(1)
        index = torch.randperm(N, generator=g)[:KEPT].sort().values.to(device)
        value = randn(KEPT, dtype=dtype, seed=2, scale=1e-6, device=device)
        return (randn(4096, 4096, dtype=dtype, device=device), index, value), {"check": False}

    return make


# x is read and written a 64-byte line at a time, since neighbours are 100 elements apart.
BENCH = Bench(
    "expert_scatter",
    (
        Variant("fp32 4096x4096, 1 %", _case(torch.float32), bytes=KEPT * (2 * 64 + 8 + 4 + 4)),
        Variant("bf16 4096x4096, 1 %", _case(torch.bfloat16), bytes=KEPT * (2 * 64 + 8 + 2 + 2)),
    ),
    {"torch": index_add},
)

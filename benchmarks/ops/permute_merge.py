import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def indexing(base, other, perms, weight=0.5, *, out=None, check=True):  # type: ignore[no-untyped-def]
    """What a user writes: index_select per axis, then a weighted sum."""
    for axis, index in perms.items():
        other = other.index_select(axis, index)
    return (1 - weight) * base + weight * other


def _case(*axes, dtype=torch.float32):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, (other,) = family(1, 4096, 4096, dtype=dtype, device=device)
        perms = {a: torch.randperm(4096, generator=torch.Generator().manual_seed(a)).to(device) for a in axes}
        return (base, other, perms), {"out": torch.empty_like(base), "check": False}

    return make


BENCH = Bench(
    "permute_merge",
    (
        Variant("fp32 4096x4096 rows", _case(0), bytes=12 * N, flops=3 * N),
        Variant("fp32 4096x4096 rows and columns", _case(0, 1), bytes=12 * N, flops=3 * N),
        Variant("bf16 4096x4096 rows", _case(0, dtype=torch.bfloat16), bytes=6 * N, flops=3 * N, quick=False),
    ),
    {"torch": indexing},
)

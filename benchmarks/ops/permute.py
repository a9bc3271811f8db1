import torch

from ..declare import Bench, Variant, randn

N = 4096 * 4096


def _perm(n, seed, device):  # type: ignore[no-untyped-def]
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)


def indexing(x, perms, *, out=None, check=True):  # type: ignore[no-untyped-def]
    """What a user writes: one index_select per axis."""
    for axis, index in perms.items():
        x = x.index_select(axis, index)
    return x


def _case(*axes, dtype=torch.float32):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        x = randn(4096, 4096, dtype=dtype, device=device)
        return (x, {a: _perm(4096, a, device) for a in axes}), {"out": torch.empty_like(x), "check": False}

    return make


BENCH = Bench(
    "permute",
    (
        Variant("fp32 4096x4096 rows", _case(0), bytes=8 * N),
        Variant("fp32 4096x4096 rows and columns", _case(0, 1), bytes=8 * N),
        Variant("bf16 4096x4096 rows and columns", _case(0, 1, dtype=torch.bfloat16), bytes=4 * N, quick=False),
    ),
    {"torch": indexing},
)

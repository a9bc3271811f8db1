import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def plain_torch(base, models):  # type: ignore[no-untyped-def]
    return [(m.float() - base.float()).abs().mean() for m in models]


def _case(dtype):  # type: ignore[no-untyped-def]
    return lambda device: (family(4, 4096, 4096, dtype=dtype, device=device), {})


BENCH = Bench(
    "abs_sum",
    tuple(
        Variant(f"base, 4 x {name} 4096x4096", _case(dtype), bytes=5 * dtype.itemsize * N, flops=12 * N)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    ),
    {"torch": plain_torch},
)

import torch

from ..declare import Bench, Variant, randn

N = 4096 * 4096


def dots(gradient, candidates, **_):  # type: ignore[no-untyped-def]
    """What a user writes: a dot product and two norms per candidate."""
    g = gradient.float().flatten()
    return [(torch.dot(g, c.float().flatten()), c.float().norm(), g.norm()) for c in candidates]


def _case(count, dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        tensors = [randn(4096, 4096, dtype=dtype, seed=i, device=device) for i in range(count + 1)]
        return (tensors[0], tensors[1:]), {}

    return make


BENCH = Bench(
    "fw_products",
    (
        Variant("8 x bf16 4096x4096", _case(8, torch.bfloat16), bytes=9 * 2 * N, flops=34 * N),
        Variant("4 x fp32 4096x4096", _case(4, torch.float32), bytes=5 * 4 * N, flops=18 * N),
    ),
    {"torch": dots},
    ceiling="read",
)

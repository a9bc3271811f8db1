import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def softmaxes(base, other):  # type: ignore[no-untyped-def]
    """What a user writes."""
    p, q = other.double().softmax(-1) + 1e-8, base.double().softmax(-1) + 1e-8
    return torch.nn.functional.kl_div(q.log(), p, reduction="none").sum(-1)


def _case(dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, (other,) = family(1, 4096, 4096, dtype=dtype, device=device)
        return (base, other), {}

    return make


BENCH = Bench(
    "arcee_divergence",
    (
        Variant("bf16 4096x4096", _case(torch.bfloat16), bytes=2 * 2 * N, flops=70 * N),
        Variant("fp32 4096x4096", _case(torch.float32), bytes=2 * 4 * N, flops=70 * N, quick=False),
    ),
    {"torch": softmaxes},
)

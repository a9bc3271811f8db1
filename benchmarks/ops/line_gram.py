import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def products(base, models, along="rows"):  # type: ignore[no-untyped-def]
    """What a user writes."""
    deltas = [(m - base).float() for m in models]
    axis = 1 if along == "rows" else 0
    return torch.stack([(a * b).sum(axis) for i, a in enumerate(deltas) for b in deltas[i:]], 1)


def _case(along, dtype=torch.bfloat16):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, models = family(2, 4096, 4096, dtype=dtype, device=device)
        return (base, models), {"along": along}

    return make


BENCH = Bench(
    "line_gram",
    (
        Variant("rows, 2 x bf16 4096x4096", _case("rows"), bytes=3 * 2 * N, flops=8 * N),
        Variant("columns, 2 x bf16 4096x4096", _case("columns"), bytes=3 * 2 * N, flops=8 * N),
        Variant("rows, 2 x fp32 4096x4096", _case("rows", torch.float32), bytes=3 * 4 * N, flops=8 * N, quick=False),
    ),
    {"torch": products},
)

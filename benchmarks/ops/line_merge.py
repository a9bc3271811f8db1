import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096


def weighted(base, models, weight, along="rows", **_):  # type: ignore[no-untyped-def]
    """What a user writes."""
    lines = weight.to(base.dtype).unsqueeze(2 if along == "rows" else 1)
    return base + sum((m - base) * w for m, w in zip(models, lines, strict=True))


def _case(along, dtype=torch.bfloat16):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, models = family(2, 4096, 4096, dtype=dtype, device=device)
        weight = torch.full((2, 4096), 0.5, device=device)
        return (base, models, weight), {"along": along, "out": torch.empty_like(base)}

    return make


BENCH = Bench(
    "line_merge",
    (
        Variant("rows, 2 x bf16 4096x4096", _case("rows"), bytes=4 * 2 * N, flops=6 * N),
        Variant("columns, 2 x bf16 4096x4096", _case("columns"), bytes=4 * 2 * N, flops=6 * N),
        Variant("rows, 2 x fp32 4096x4096", _case("rows", torch.float32), bytes=4 * 4 * N, flops=6 * N, quick=False),
    ),
    {"torch": weighted},
)

import torch

from fastmerge.ops import sce_variance, topk_thresholds

from ..declare import Bench, Variant, family

N = 4096 * 4096


def stacked(base, models, rule=None, **_):  # type: ignore[no-untyped-def]
    """What a user writes; the mask of the selection by torch.topk."""
    deltas = torch.stack([(m - base).float().flatten() for m in models])
    if rule is not None:
        keep = torch.zeros(deltas.shape[1], device=base.device)
        deltas = deltas * keep.scatter_(0, deltas.var(0, correction=0).topk(deltas.shape[1] // 5).indices, 1.0)
    return deltas.square().sum(1)


def _case(selected):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, models = family(4, 4096, 4096, dtype=torch.bfloat16, device=device)
        rule = topk_thresholds(None, [sce_variance(base, models)], 0.2)[0] if selected else None
        return (base, models, rule), {}

    return make


BENCH = Bench(
    "sce_energy",
    (
        Variant("0.2 of 4 x bf16 4096x4096", _case(True), bytes=5 * 2 * N, flops=32 * N),
        Variant("all of 4 x bf16 4096x4096", _case(False), bytes=5 * 2 * N, flops=12 * N, quick=False),
    ),
    {"torch": stacked},
)

import torch

from fastmerge.ops import sce_variance, topk_thresholds

from ..declare import Bench, Variant, family

N = 4096 * 4096


def stacked(base, models, weight, rule=None, **_):  # type: ignore[no-untyped-def]
    """What a user writes; the mask of the selection by torch.topk."""
    deltas = torch.stack([(m - base).float().flatten() for m in models])
    if rule is not None:
        keep = torch.zeros(deltas.shape[1], device=base.device)
        deltas = deltas * keep.scatter_(0, deltas.var(0, correction=0).topk(deltas.shape[1] // 5).indices, 1.0)
    agrees = (deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)) * weight
    merged = (deltas * agrees).sum(0) / agrees.sum(0).clamp(min=1e-6)
    return (base.flatten() + merged).to(base.dtype).view(base.shape)


def _case(selected, dtype=torch.bfloat16):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, models = family(4, 4096, 4096, dtype=dtype, device=device)
        rule = topk_thresholds(None, [sce_variance(base, models)], 0.2)[0] if selected else None
        return (base, models, 0.25, rule), {"out": torch.empty_like(base)}

    return make


BENCH = Bench(
    "sce_merge",
    (
        Variant("0.2 of 4 x bf16 4096x4096", _case(True), bytes=6 * 2 * N, flops=48 * N),
        Variant("all of 4 x bf16 4096x4096", _case(False), bytes=6 * 2 * N, flops=24 * N, quick=False),
        Variant("0.2 of 4 x fp32 4096x4096", _case(True, torch.float32), bytes=6 * 4 * N, flops=48 * N, quick=False),
    ),
    {"torch": stacked},
)

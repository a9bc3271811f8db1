import torch

from fastmerge.ops import topk_thresholds

from ..declare import Bench, Variant, family

N = 4096 * 4096


def plain_torch(base, models, weight, density=1.0, *, normalize=False, trim="topk", thresholds=None, elect="sum", **_):  # type: ignore[no-untyped-def]
    """What a user writes: trimmed deltas by torch.topk or a random mask, stacked, elected, averaged."""
    trimmed = []
    for m in models:
        delta = (m - base).float().flatten()
        if trim == "random":
            keep = torch.rand_like(delta) < density
        else:
            k = int((0.2 if thresholds else density) * delta.numel())
            keep = torch.zeros_like(delta, dtype=torch.bool).scatter_(0, delta.abs().topk(k).indices, True)
        trimmed.append(torch.where(keep, delta, 0.0))
    terms = torch.stack(trimmed) * weight
    if elect is None:
        return (base.flatten() + terms.sum(0)).to(base.dtype).view(base.shape)
    agrees = torch.sign(terms) == torch.where(terms.sum(0) >= 0, 1.0, -1.0)
    merged = (terms * agrees).sum(0)
    if normalize:
        merged = merged / (agrees * weight).sum(0).clamp(min=weight)
    return (base.flatten() + merged).to(base.dtype).view(base.shape)


def _ties(dtype, given):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, models = family(4, 4096, 4096, dtype=dtype, device=device)
        # `out` is given, so that the kernel is timed and not the first touch of fresh pages.
        kwargs = {"normalize": True, "out": torch.empty_like(base)}
        if given:
            return (base, models, 1.0), {**kwargs, "thresholds": topk_thresholds(base, models, 0.2)}
        return (base, models, 1.0, 0.2), kwargs

    return make


def _dare(count, **kwargs):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, models = family(count, 4096, 4096, dtype=torch.bfloat16, device=device)
        arguments = {"trim": "random", "rescale": "density", "out": torch.empty_like(base), **kwargs}
        return (base, models, 0.5, 0.2), arguments

    return make


BENCH = Bench(
    "consensus_merge",
    (
        Variant("ties, 4 x bf16 4096x4096", _ties(torch.bfloat16, False), bytes=(2 * 5 + 1) * 2 * N, flops=32 * N),
        Variant("merge pass, 4 x bf16 4096x4096", _ties(torch.bfloat16, True), bytes=6 * 2 * N, flops=32 * N),
        Variant("merge pass, 4 x fp32 4096x4096", _ties(torch.float32, True), bytes=6 * 4 * N, flops=32 * N),
        Variant("ties, 4 x fp32 4096x4096", _ties(torch.float32, False), bytes=11 * 4 * N, flops=32 * N, quick=False),
        Variant("dare_linear, 4 x bf16 4096x4096", _dare(4, elect=None), bytes=6 * 2 * N, flops=12 * N),
        Variant("dare_ties, 4 x bf16 4096x4096", _dare(4), bytes=6 * 2 * N, flops=32 * N, quick=False),
        Variant("dare, 1 x bf16 4096x4096", _dare(1, elect=None), bytes=3 * 2 * N, flops=3 * N, quick=False),
    ),
    {"torch": plain_torch},
)

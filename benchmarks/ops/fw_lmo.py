import torch

from ..declare import Bench, Variant, randn

L, M = 8, 2048 * 1024  # tensors of a layer-wise oracle and their size
N = L * M


def loop(gradients, candidates, *, metric="dot", **_):  # type: ignore[no-untyped-def]
    """What a user writes: for every tensor and candidate a cosine, norms computed each time."""
    choice = []
    for layer, g in enumerate(gradients):
        a = g.float().flatten()
        scores = []
        for candidate in candidates:
            b = candidate[layer].float().flatten()
            scores.append(torch.dot(a, b) / (a.norm() * b.norm()) if metric == "cosine" else torch.dot(a, b))
        choice.append(int(torch.stack(scores).argmin()))
    return choice


def _case(count, gradient=torch.float32, candidate=torch.float32, **kwargs):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        models = [
            [randn(2048, 1024, seed=L * k + i, dtype=candidate if k else gradient, device=device) for i in range(L)]
            for k in range(count + 1)
        ]
        return (models[0], models[1:]), kwargs

    return make


def _mixed(gradient, candidate):  # type: ignore[no-untyped-def]
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = f"8 candidates, {short[candidate]}, dot, {short[gradient]} gradient"
    size = (8 * candidate.itemsize + gradient.itemsize) * N
    return Variant(name, _case(8, gradient, candidate), bytes=size, flops=16 * N, quick=False)


BENCH = Bench(
    "fw_lmo",
    (
        Variant("8 candidates, fp32, cosine", _case(8, metric="cosine"), bytes=9 * 4 * N, flops=34 * N),
        _mixed(torch.float32, torch.float32),
        _mixed(torch.float32, torch.bfloat16),
        _mixed(torch.bfloat16, torch.bfloat16),
        _mixed(torch.float32, torch.float16),
        _mixed(torch.float16, torch.float16),
    ),
    {"torch": loop},
    ceiling="read",
)

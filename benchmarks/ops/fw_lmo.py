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


def _case(count, **kwargs):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        models = [[randn(2048, 1024, seed=L * k + i, device=device) for i in range(L)] for k in range(count + 1)]
        return (models[0], models[1:]), kwargs

    return make


BENCH = Bench(
    "fw_lmo",
    (
        Variant("8 candidates, fp32, cosine", _case(8, metric="cosine"), bytes=9 * 4 * N, flops=34 * N),
        Variant("8 candidates, fp32, dot", _case(8), bytes=9 * 4 * N, flops=16 * N, quick=False),
    ),
    {"torch": loop},
)

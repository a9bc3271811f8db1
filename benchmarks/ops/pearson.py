import torch

from ..declare import Bench, Variant, randn

U, F = 1024, 8192


def whole_matrix(a, b, **_):  # type: ignore[no-untyped-def]
    """What the published code does: the correlations of all pairs, of which one block is used."""
    return torch.corrcoef(torch.cat([a, b]))[: len(a), len(a) :]


def _case(units, features):  # type: ignore[no-untyped-def]
    return lambda device: ((randn(units, features, device=device), randn(units, features, seed=1, device=device)), {})


BENCH = Bench(
    "pearson",
    (
        Variant("1024 units, 8192 features", _case(U, F), bytes=4 * (2 * U * F + U * U), flops=2 * U * U * F),
        Variant("2048 units, 8192 features", _case(2 * U, F), bytes=16 * U * (F + U), flops=8 * U * U * F, quick=False),
    ),
    {"torch.corrcoef": whole_matrix},
)

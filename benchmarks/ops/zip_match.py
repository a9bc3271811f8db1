import torch

from ..declare import Bench, Variant, randn


def copying_greedy(similarity, **_):  # type: ignore[no-untyped-def]
    """What the published code does: a full argmax and a smaller copy of the matrix for every merge."""
    s = similarity.clone().fill_diagonal_(float("-inf"))
    columns = len(s)
    merges = []
    while columns > len(similarity) // 2:
        r, c = divmod(int(s.triu(1).masked_fill(torch.ones_like(s).tril().bool(), float("-inf")).argmax()), columns)
        merges.append((r, c))
        row = 0.5 * torch.minimum(s[r], s[c])
        s[r], s[:, r] = row, row
        keep = [i for i in range(columns) if i != c]
        s = s[keep][:, keep]
        s.fill_diagonal_(float("-inf"))
        columns -= 1
    return merges


def _case(n):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        x = randn(2 * n, 4 * n, device=device)
        return (torch.corrcoef(x),), {}

    return make


BENCH = Bench(
    "zip_match",
    (
        Variant("n = 64", _case(64), bytes=4 * 128 * 128),
        Variant("n = 1024", _case(1024), bytes=4 * 2048 * 2048, quick=False),
    ),
    {"copying greedy": copying_greedy},
)

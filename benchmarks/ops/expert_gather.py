import torch

from ..declare import Bench, Variant, family

N = 4096 * 4096
KEPT = 4096 * 40


def torch_topk(base, model, density, *, offset=0):  # type: ignore[no-untyped-def]
    """What a user writes: torch.topk of every row's magnitudes, sorted by position, gathered."""
    delta = model.float() - base.float()
    index = delta.abs().topk(int(density * delta.shape[-1]), dim=-1).indices.sort(dim=-1).values
    value = delta.gather(-1, index)
    start = torch.arange(len(index), device=index.device)[:, None] * delta.shape[-1]
    return (index + start).view(-1) + offset, value.view(-1)


def torch_topk_alone(base, model, density, *, offset=0):  # type: ignore[no-untyped-def]
    """Only the difference, its magnitudes and torch.topk, entries unsorted."""
    delta = model.float() - base.float()
    return delta.abs().topk(int(density * delta.shape[-1]), dim=-1)


def _case(dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        base, (model,) = family(1, 4096, 4096, dtype=dtype, device=device)
        return (base, model, 0.01), {}

    return make


BENCH = Bench(
    "expert_gather",
    (
        Variant("fp32 4096x4096, 1 % of every row", _case(torch.float32), bytes=2 * 4 * N + 12 * KEPT),
        Variant("bf16 4096x4096, 1 % of every row", _case(torch.bfloat16), bytes=2 * 2 * N + 12 * KEPT),
    ),
    {"torch.topk": torch_topk, "torch.topk alone": torch_topk_alone},
)

import torch

from ..declare import Bench, Variant, randn

N = 4096 * 4096


def torch_topk(x, density, *, dim=None):  # type: ignore[no-untyped-def]
    """What a user writes: torch.topk of the magnitudes, scattered into a mask."""
    rows = x.abs().reshape(1, -1) if dim is None else x.abs()
    largest = rows.topk(int(density * rows.shape[-1]), dim=-1).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, largest, True).view(x.shape)


def torch_kthvalue(x, density, *, dim=None):  # type: ignore[no-untyped-def]
    """The quicker way, which keeps every tie: a threshold by torch.kthvalue."""
    rows = x.abs().reshape(1, -1) if dim is None else x.abs()
    n = rows.shape[-1]
    return (rows >= rows.kthvalue(n - int(density * n) + 1, dim=-1, keepdim=True).values).view(x.shape)


def cupy_partition(x, density, *, dim=None):  # type: ignore[no-untyped-def]
    """The same with CuPy: a threshold by cupy.partition, which keeps every tie."""
    import cupy

    rows = cupy.abs(x).reshape(1, -1) if dim is None else cupy.abs(x)
    n = rows.shape[-1]
    at = n - int(density * n)
    return (rows >= cupy.partition(rows, at, axis=-1)[..., at : at + 1]).reshape(x.shape)


def _case(dtype, **kwargs):  # type: ignore[no-untyped-def]
    return lambda device: ((randn(4096, 4096, dtype=dtype, device=device), 0.2), kwargs)


BENCH = Bench(
    "topk_mask",
    (
        Variant("fp32 4096x4096, 20 %", _case(torch.float32), bytes=(4 + 1) * N),
        Variant("bf16 4096x4096, 20 %", _case(torch.bfloat16), bytes=(2 + 1) * N),
        Variant("fp16 4096x4096, 20 %", _case(torch.float16), bytes=(2 + 1) * N, quick=False),
        Variant("fp32 4096x4096, 20 % of every row", _case(torch.float32, dim=-1), bytes=(4 + 1) * N, quick=False),
    ),
    {"torch.topk": torch_topk, "torch.kthvalue": torch_kthvalue},
    cupy={"cupy.partition": cupy_partition},
)

import torch

from ..declare import Bench, Variant, randn

N = 8 * 2048 * 1024


def axpy(params, vertices, gamma, **_):  # type: ignore[no-untyped-def]
    """What a user writes: theta += gamma * (s - theta), tensor by tensor."""
    for p, s in zip(params, vertices, strict=True):
        p += gamma * (s.to(p.dtype) - p)


def _case(vertex_dtype):  # type: ignore[no-untyped-def]
    def make(device):  # type: ignore[no-untyped-def]
        params = [randn(2048, 1024, seed=i, device=device) for i in range(8)]
        vertices = [randn(2048, 1024, seed=8 + i, dtype=vertex_dtype, device=device) for i in range(8)]
        return (params, vertices, 0.1), {}

    return make


BENCH = Bench(
    "fw_step",
    (
        Variant("8 x fp32 2048x1024", _case(torch.float32), bytes=12 * N, flops=3 * N),
        Variant("8 x fp32 2048x1024, bf16 vertices", _case(torch.bfloat16), bytes=10 * N, flops=3 * N),
        Variant("8 x fp32 2048x1024, fp16 vertices", _case(torch.float16), bytes=10 * N, flops=3 * N, quick=False),
    ),
    {"torch": axpy},
)

"""Every operator's cases on a real CUDA device: `make test-gpu`. Deselected by `make test`; needs a device to pass."""

import pytest
import torch
from checks import check_op

from fastmerge import ops
from fastmerge._dispatch import Op

OPS = sorted((op for op in vars(ops).values() if isinstance(op, Op)), key=lambda op: op.name)

pytestmark = pytest.mark.gpu


def test_there_is_a_device():
    assert torch.cuda.is_available(), "these tests need a CUDA device and a CUDA build of torch"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_backends_on_the_device_agree_with_the_reference(op):
    served = [name for name in ("triton", "cuda") if name in op.backends]
    assert check_op(op, device="cuda") > 0 or not served, f"none of {served} could run a single case"


def test_matrices_filtered_together_have_the_bits_of_each_alone():
    for shape, cutoff, dtype in (
        ((1024, 1024), 0.1, torch.bfloat16), ((1024, 1024), 0.4, torch.bfloat16), ((30, 31), 0.3, torch.float32),
        ((57, 131), 0.9, torch.float32), ((64, 48), 0.1, torch.float64),
    ):  # fmt: skip
        every = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4)]
        every[2][1, 3] = float("nan")
        together = ops.highpass_filter.each([((x, cutoff), {"backend": "triton"}) for x in every])
        for i, (x, got) in enumerate(zip(every, together, strict=True)):
            assert torch.equal(got.isnan(), torch.full_like(got, i == 2, dtype=torch.bool))
            assert torch.equal(got.nan_to_num(), ops.highpass_filter(x, cutoff, backend="triton").nan_to_num())


def test_a_graph_keeps_the_tables_it_copies():
    """Replays read host memory again: it must not have gone to somebody else meanwhile."""
    base, *models = (
        torch.randn(300, 300, device="cuda") for _ in range(21)
    )  # so many that their addresses are a table
    want = ops.weighted_sum(base, models, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.weighted_sum(base, models, 0.1)
    others = [torch.full((n,), -1, dtype=torch.int64).pin_memory() for n in range(1, 200)]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
    assert len(others) == 199

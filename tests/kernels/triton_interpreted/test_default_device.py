"""Kernels where torch's default device is another one: their tables are made on the host, then copied."""

import pytest
import torch
from checks import clone_tree, compare

from fastmerge import ops
from fastmerge._dispatch import Op

OPS = [op for name in ops.__all__ if isinstance(op := getattr(ops, name), Op) and "triton" in op.backends]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_operators(op):
    count = 0
    for case in op.cases[:4]:
        inputs = case.make(torch.Generator().manual_seed(0), case.dtypes[0])
        (args, kwargs), (again, options) = clone_tree(inputs), clone_tree(inputs)
        if op.why_not("triton", *args, **kwargs) is not None:
            continue
        want = op(*args, backend="triton", **kwargs)
        with torch.device("meta"):
            got = op(*again, backend="triton", **options)
        compare(got, want, op, case.name)
        count += 1
    assert count >= 2


def test_tensors_that_share_launches():
    models = [torch.randn(40, n, generator=torch.Generator().manual_seed(n)) for n in (30, 30, 50)]
    for op, given in (
        (ops.highpass_filter, [((m, 0.3), {}) for m in models]),
        (ops.weighted_sum, [((m, [m + 1] * 6, 0.1), {}) for m in models]),
        (ops.consensus_merge, [((m, [m + 1, -m], 0.5, 0.5), {"rescale": "l1"}) for m in models]),
    ):
        calls = [(args, kwargs | {"backend": "triton"}) for args, kwargs in given]
        want = op.each(calls)
        with torch.device("meta"):
            got = op.each(calls)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)

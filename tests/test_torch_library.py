"""The torch.ops shells: schema, fake implementations and compilation, and the same results as fastmerge.ops."""

import pytest
import torch
from checks import assert_same_bits

import fastmerge.torch_library  # noqa: F401
from fastmerge import ops

X = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
CALLS = {
    "topk_mask": ((X, 0.3, -1), lambda: ops.topk_mask(X, 0.3, dim=-1)),
    "random_mask": ((X, 0.3, 0.1, 7, "w"), lambda: ops.random_mask(X, 0.3, epsilon=0.1, seed=7, name="w")),
    "weighted_sum": ((X, [X + 1, X * 2], [0.3, 0.7]), lambda: ops.weighted_sum(X, [X + 1, X * 2], [0.3, 0.7])),
    "highpass_filter": ((X, 0.3, "radial"), lambda: ops.highpass_filter(X, 0.3)),
    "pearson": ((X, X.flip(0)), lambda: ops.pearson(X, X.flip(0))),
}


@pytest.mark.parametrize("name", CALLS)
def test_shell_is_the_op_and_passes_opcheck(name):
    args, want = CALLS[name]
    shell = getattr(torch.ops.fastmerge, name)
    assert_same_bits(shell(*args), want())
    torch.library.opcheck(shell.default, args)


def test_an_empty_base_is_allowed():
    got = torch.ops.fastmerge.weighted_sum(None, [X, X], [0.25, 0.75])
    assert_same_bits(got, ops.weighted_sum(None, [X, X], [0.25, 0.75]))


def test_it_compiles_without_graph_breaks():
    def f(x):  # type: ignore[no-untyped-def]
        return torch.where(torch.ops.fastmerge.topk_mask(x, 0.5), x, 0.0) + 1

    assert_same_bits(torch.compile(f, fullgraph=True, backend="aot_eager")(X), f(X))

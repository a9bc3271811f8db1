import math

import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge.ops import fw_lmo, fw_products
from fastmerge.ops.fw_lmo import choose
from fastmerge.ops.fw_products import BLOCK


def test_backends_agree_with_the_reference():
    assert check_op(fw_lmo, backends=["cpu"]) >= 55


def test_golden_table():
    g = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    a, b = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, -1.0])], [torch.tensor([-5.0, 0.0]), torch.tensor([0.0, 3.0])]
    got = fw_lmo(g, [a, b])
    assert got.score.tolist() == [[3, -2], [-5, 6]]
    assert got.choice.tolist() == [1, 0]
    assert got.sqnorms.tolist() == [[25, 2], [25, 9]]
    model = fw_lmo(g, [a, b], granularity="model")
    assert model.score.tolist() == [[1], [1]]
    assert model.choice.tolist() == [0]  # equal scores go to the first
    cosine = fw_lmo(g, [a, b], metric="cosine")
    torch.testing.assert_close(
        cosine.score, torch.tensor([[0.6, -1 / math.sqrt(2)], [-1.0, 1.0]], dtype=torch.float64), rtol=1e-15, atol=0
    )
    both = fw_lmo(g, [a, b], metric="cosine", granularity="model")
    assert both.choice.tolist() == [0]
    assert both.score[1].item() == 0.0


def test_zero_vertex_and_nan():
    g = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([float("nan")])]
    pool = [
        [torch.tensor([2.0]), torch.tensor([2.0]), torch.ones(1)],
        [torch.tensor([1.0]), -torch.ones(1), torch.ones(1)],
    ]
    assert fw_lmo(g, pool, zero_if_ascent=True).choice.tolist() == [-1, 1, -2]
    assert fw_lmo(g[:2], [p[:2] for p in pool]).choice.tolist() == [1, 1]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_feeding_in_pieces_gives_the_same_bits(backend, dtype):
    gen = torch.Generator().manual_seed(0)
    g, *pool = (torch.randn(3 * BLOCK + 1234, generator=gen).to(dtype) for _ in range(4))
    whole = fw_products(g, pool, backend=backend)
    carry = None
    for begin, end in [(0, BLOCK), (BLOCK, 3 * BLOCK), (3 * BLOCK, g.numel())]:
        carry = fw_products(g[begin:end], [s[begin:end] for s in pool], carry=carry, backend=backend)
    for got, want in zip(carry, whole, strict=True):
        assert_same_bits(got, want)
    exact = torch.stack([(g.double() * s.double()).sum() for s in pool])
    torch.testing.assert_close(whole.dots, exact, rtol=1e-5, atol=1e-2)


def test_known_norms_give_the_same_choice():
    gen = torch.Generator().manual_seed(0)
    g = [torch.randn(100, generator=gen), torch.randn(7, 9, generator=gen)]
    pool = [[torch.randn(t.shape, generator=gen) for t in g] for _ in range(4)]
    first = fw_lmo(g, pool, metric="cosine")
    again = fw_lmo(g, pool, metric="cosine", sqnorms=first.sqnorms)
    for got, want in zip(again, first, strict=True):
        assert_same_bits(got, want)


def test_choose_from_streamed_products():
    gen = torch.Generator().manual_seed(0)
    g = [torch.randn(100, generator=gen), torch.randn(7, 9, generator=gen)]
    pool = [[torch.randn(t.shape, generator=gen) for t in g] for _ in range(4)]
    products = [fw_products(t, [p[n] for p in pool]) for n, t in enumerate(g)]
    for granularity in ("layer", "model"):
        want = fw_lmo(g, pool, metric="cosine", granularity=granularity)
        got = choose(products, metric="cosine", granularity=granularity)
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        (([], []), {}, "empty"),
        (([torch.zeros(2)], [[]]), {}, r"candidates\[0\] has 0 tensors for 1"),
        (([torch.zeros(2)], [[torch.zeros(3)]]), {}, r"tensor 0 of candidates\[0\] has shape"),
        (([torch.zeros(2)], [[torch.zeros(2)]]), {"metric": "l2"}, "'l2'"),
        (([torch.zeros(2)], [[torch.zeros(2)]]), {"granularity": "row"}, "'row'"),
        (([torch.zeros(2)], [[torch.zeros(2)]]), {"sqnorms": torch.zeros(2, 1)}, "sqnorms"),
        (([torch.zeros(2).int()], [[torch.zeros(2)]]), {}, "int32"),
    ],
)
def test_bad_input_is_named(args, kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match):
        fw_lmo(*args, **kwargs)

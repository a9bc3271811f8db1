import itertools

import pytest
import torch
import xxhash
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import random_mask
from fastmerge.ops.philox import draw_key, draws, philox


def test_backends_agree_with_the_reference():
    assert check_op(random_mask, backends=["cpu"]) >= 60


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    got = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in got) == words


def test_draws_are_the_documented_digits():
    key = draw_key(7, "layer.weight")
    assert key[1] << 32 | key[0] == xxhash.xxh64_intdigest(b"layer.weight", seed=7)
    whole = draws(64, key=key, stream=3)
    for i in (0, 1, 7, 8, 63):
        digits = [philox(tuple(torch.tensor([c]) for c in (i // 8, 0, 3, d)), key) for d in (0, 1)]
        high, low = (int(w[i % 8 // 2]) >> 16 * (i % 2) & 0xFFFF for w in digits)
        assert int(whole[i]) == high << 16 | low


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_do_not_matter(epsilon, threads, monkeypatch):
    x = torch.randn(700, 300, generator=torch.Generator().manual_seed(1))
    want = random_mask(x, 0.3, epsilon=epsilon, seed=5, name="w", stream=1, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    rows = [0, 1, 350, 700]
    pieces = [
        random_mask(x[a:b], 0.3, epsilon=epsilon, seed=5, name="w", stream=1, offset=300 * a, backend="cpu")
        for a, b in itertools.pairwise(rows)
    ]
    assert_same_bits(torch.cat(pieces), want)


def test_undecided_digits_are_settled_by_the_second():
    # About 15 of a million draws share the limit's high digit; the limit sits in the middle of one.
    x = torch.empty(1_000_000)
    density = (0x4000 + 0.5) / 65536
    draw = draws(x.numel(), key=draw_key(0, ""), stream=0)
    assert int(((draw >> 16) == 0x4000).sum()) > 3
    assert_same_bits(random_mask(x, density, backend="cpu"), draw < int(density * 2**32))


def test_statistics():
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(1))
    mask = random_mask(x, 0.3, name="a")
    assert abs(float(mask.float().mean()) - 0.3) < 4 * (0.21 / 1e6) ** 0.5
    both = (mask & random_mask(x, 0.3, name="a", stream=1)).float().mean()
    assert abs(float(both) - 0.09) < 4 * (0.0819 / 1e6) ** 0.5
    ranked = random_mask(x, 0.5, epsilon=0.4)
    rank = x.abs().argsort(dim=1).argsort(dim=1)
    assert (
        abs(float(ranked[rank >= 900].float().mean()) - 0.86) < 0.006
    )  # the mean of 0.5 - 0.4 + 0.8 r over the top tenth
    assert abs(float(ranked[rank < 100].float().mean()) - 0.14) < 0.006


def test_golden_rescale():
    x = torch.tensor([1.0, -2.0, 3.0, -0.5])
    mask = random_mask(x, 0.5, seed=1)
    out = random_mask(x, 0.5, seed=1, rescale="density")
    assert out.tolist() == [2 * v if keep else 0.0 for v, keep in zip(x.tolist(), mask.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((torch.zeros(2), -0.1), {}, "density -0.1"),
        ((torch.zeros(2), 0.1), {"epsilon": 0.1}, "strictly inside"),
        ((torch.zeros(2, 3), 0.5), {"epsilon": 0.1, "offset": 4}, "does not start a row of 3"),
        ((torch.zeros(5), 0.5), {"epsilon": 0.1, "offset": 5}, "whole rows"),
        ((torch.zeros(2), 0.5), {"epsilon": float("nan")}, "epsilon nan"),
        ((torch.zeros(2), 0.5), {"offset": -1}, "offset -1"),
        ((torch.zeros(2), 0.5), {"rescale": "l2"}, "rescale 'l2'"),
        ((torch.zeros(2, dtype=torch.int64), 0.5), {}, "torch.int64"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_input_is_named(args, kwargs, match, backend):
    with pytest.raises((ValueError, TypeError), match=match):
        random_mask(*args, backend=backend, **kwargs)


ROWS = {
    "smooth": lambda x: x,
    "mostly zeros": lambda x: x * (x.abs() > 1.5),
    "zeros": lambda x: x * 0.0,
    "few values, each often": lambda x: x.round(),
    "many values, each often": lambda x: (64 * x).round() / 64,
    "wild": lambda x: x.double().pow(21).to(x.dtype),
    "subnormal": lambda x: x * 1e-42,
    "one giant": lambda x: torch.where(torch.arange(x.shape[-1]) == 5, torch.finfo(x.dtype).max, x),
    "half Inf and NaN": lambda x: torch.where(x > 0, torch.where(x > 0.5, torch.nan, torch.inf), x),
}


@pytest.mark.parametrize("length", [1, 2, 128, 129, 2049, 5000])
@pytest.mark.parametrize("rows", ROWS)
def test_ranks_of_odd_rows(rows, length):
    """Whatever the distribution and however a row is ranked (one by one, in buckets, sorted), the mask is the same."""
    g = torch.Generator().manual_seed(length)
    for dtype in (torch.float32, torch.float64):
        x = ROWS[rows](torch.randn(6, length, generator=g).to(dtype))
        for density, epsilon in ((0.5, 0.49), (0.3, 0.1)):
            given = {"epsilon": epsilon, "seed": 5, "name": "w", "stream": 1, "offset": 3 * length}
            want = random_mask(x, density, **given, backend="reference")
            assert torch.equal(random_mask(x, density, **given, backend="cpu"), want)

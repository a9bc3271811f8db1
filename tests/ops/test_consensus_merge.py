import math

import pytest
import torch
from checks import assert_same_bits, check_op
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import _native
from fastmerge.ops import L1Stream, Threshold, consensus_merge, random_mask, topk_mask, topk_thresholds, weighted_sum
from fastmerge.ops.rescale import block_sums, l1_factor

BACKENDS = ["reference", "cpu"]


def family(n, count, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = n if isinstance(n, tuple) else (n,)
    base = torch.randn(shape, generator=g) * 0.02
    return base.to(dtype), [(base + torch.randn(shape, generator=g) * 0.002).to(dtype) for _ in range(count)]


def test_backends_agree_with_the_reference():
    assert check_op(consensus_merge, backends=["cpu"]) >= 120


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_ties(backend):
    base = torch.tensor([10.0, 10.0, 10.0, 10.0])
    a = base + torch.tensor([4.0, -1.0, 3.0, 0.5])
    b = base + torch.tensor([-2.0, -2.0, 5.0, 0.0])
    # u with weights 1 and 2: a [4, -1, 3, .5], b [-4, -4, 10, 0]; sums [0, -5, 13, .5]: zero elects +.
    assert consensus_merge(base, [a, b], [1.0, 2.0], backend=backend).tolist() == [14.0, 5.0, 23.0, 10.5]
    got = consensus_merge(base, [a, b], [1.0, 2.0], normalize=True, scale=3.0, backend=backend)
    assert got.tolist() == [22.0, 5.0, 23.0, 11.5]  # divisors 1, 3, 3, 1
    # Two of four kept in each: a [4, 0, 3, 0], b [-2, 0, 5, 0] by the tie at -2 going to the lowest index.
    got = consensus_merge(base, [a, b], 1.0, 0.5, backend=backend)
    assert got.tolist() == [14.0, 10.0, 18.0, 10.0]
    # By count, one against one is a tie, which elects +.
    got = consensus_merge(base, [a, b], [1.0, 4.0], elect="count", backend=backend)
    assert got.tolist() == [14.0, 1.0, 33.0, 10.5]
    assert consensus_merge(base, [a, b], 1.0, elect=None, backend=backend).tolist() == [12.0, 7.0, 18.0, 10.5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_composition_of_its_parts(backend):
    base, models = family((50, 61), 3)
    plain = consensus_merge(base, models, [0.3, 0.4, 0.5], elect=None, trim=None, backend=backend)
    assert_same_bits(plain, weighted_sum(base, models, [0.3, 0.4, 0.5], backend="reference"))
    deltas = [m - base for m in models]
    trimmed = [torch.where(topk_mask(d, 0.3), d, 0.0) for d in deltas]
    want = consensus_merge(None, trimmed, 0.7, trim=None, elect="sum", backend="reference")
    assert_same_bits(consensus_merge(None, deltas, 0.7, 0.3, backend=backend), want)
    masks = [random_mask(d, 0.3, seed=4, name="q", stream=i) for i, d in enumerate(deltas)]
    dropped = [torch.where(mask, d, 0.0) for mask, d in zip(masks, deltas, strict=True)]
    want = consensus_merge(None, dropped, 0.7, trim=None, factors=[1 / 0.3] * 3, backend="reference")
    got = consensus_merge(None, deltas, 0.7, 0.3, trim="random", rescale="density", seed=4, name="q", backend=backend)
    assert_same_bits(got, want)


@pytest.mark.parametrize("trim", ["topk", "window", "random", "rank_random"])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_do_not_matter(trim, threads, monkeypatch):
    base, models = family((700, 331), 3, torch.bfloat16)
    kwargs = {"trim": trim, "gamma": 0.05, "epsilon": 0.1, "normalize": True, "seed": 3, "name": "w"}
    want = consensus_merge(base, models, [0.3, 0.4, 0.5], 0.4, rescale="l1", backend="reference", **kwargs)
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(consensus_merge(base, models, [0.3, 0.4, 0.5], 0.4, rescale="l1", backend="cpu", **kwargs), want)
    gamma = 0.05 if trim == "window" else None
    rules = topk_thresholds(base, models, 0.4, gamma=gamma) if trim in ("topk", "window") else None
    stream = L1Stream(trim=trim, density=0.4, epsilon=0.1, thresholds=rules, seed=3, name="w")
    step = 65536 if trim != "rank_random" else 65536 * 331  # the latter takes whole rows and whole blocks
    for a in reversed(range(0, base.numel(), step)):
        piece = slice(a, a + step)
        if trim == "rank_random":
            stream.feed(base, models, 0)
        else:
            stream.feed(base.view(-1)[piece], [m.view(-1)[piece] for m in models], a)
    factors = stream.finish()
    pieces = [
        consensus_merge(
            base[a:b], [m[a:b] for m in models], [0.3, 0.4, 0.5], 0.4, factors=factors, thresholds=rules,
            offset=331 * a, backend="cpu", **kwargs,
        )
        for a, b in [(0, 1), (1, 200), (200, 700)]
    ]  # fmt: skip
    assert_same_bits(torch.cat(pieces), want)


@pytest.mark.parametrize("count", range(1, 10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_single_loop_for_every_number_of_models(count, dtype):
    base, models = family(3001, count, dtype, seed=count)
    weights = [0.1 * (i + 1) for i in range(count)]
    for normalize in (False, True):
        want = consensus_merge(base, models, weights, 0.3, normalize=normalize, scale=0.9, backend="reference")
        got = consensus_merge(base, models, weights, 0.3, normalize=normalize, scale=0.9, backend="cpu")
        assert_same_bits(got, want)


def test_mixed_dtypes_out_and_in_place():
    base, models = family(5000, 3)
    mixed = [models[0].bfloat16(), models[1].half(), models[2].double()]
    want = consensus_merge(base, mixed, 0.5, 0.2, dtype=torch.bfloat16, backend="reference")
    assert_same_bits(consensus_merge(base, mixed, 0.5, 0.2, dtype=torch.bfloat16, backend="cpu"), want)
    want = consensus_merge(base, models, 0.5, 0.2, backend="reference")
    assert consensus_merge(base, models, 0.5, 0.2, out=base, backend="cpu") is base
    assert_same_bits(base, want)


def test_large_results_bypass_the_cache_with_the_same_bits():
    base, models = family(8_400_007, 2, torch.bfloat16)
    rules = topk_thresholds(base, models, 0.2)
    got = consensus_merge(base, models, 0.5, thresholds=rules)
    half = base.numel() // 2 + 3
    parts = [
        consensus_merge(base[s], [m[s] for m in models], 0.5, thresholds=rules, offset=s.start)
        for s in (slice(0, half), slice(half, base.numel()))
    ]
    assert_same_bits(got, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elect", ["sum", None])
def test_every_bit_pattern_rounds_as_the_reference_does(elect, dtype):
    """Ties, subnormal numbers, overflow to Inf, NaN: any 16 bits as inputs."""
    g = torch.Generator().manual_seed(7)
    base, *models = (torch.randint(-(2**15), 2**15, (40_007,), generator=g).short().view(dtype) for _ in range(4))
    models[0] = base.clone()
    for scale in (1.0, 0.37):
        arguments = (base, models, [0.3, 0.5, 1.0]), {"trim": None, "elect": elect, "normalize": True, "scale": scale}
        want = consensus_merge(*arguments[0], **arguments[1], backend="reference")
        assert_same_bits(consensus_merge(*arguments[0], **arguments[1], backend="cpu"), want)


def test_nan_that_is_kept_shows():
    base = torch.zeros(3)
    models = [torch.tensor([float("nan"), 1.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])]
    for backend in BACKENDS:
        got = consensus_merge(base, models, 1.0, trim=None, backend=backend)
        assert [math.isnan(v) for v in got.tolist()] == [True, False, False]


def test_block_sums_have_the_documented_order():
    x = torch.randn(70_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = []
    for start in (0, 65536):
        lanes = [0.0] * 16
        for i, v in enumerate(x[start : start + 65536].abs().tolist()):
            lanes[i % 16] += v
        total = 0.0
        for lane in lanes:
            total += lane
        want.append(total)
    assert block_sums(x).tolist() == want
    assert l1_factor(3.0, 1.5) == 2.0
    assert l1_factor(3.0, 1e-8) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 400), st.integers(1, 5), st.floats(0, 1), st.booleans(), st.sampled_from(["sum", "count", None]))
def test_property_backends_agree(n, count, density, normalize, elect):
    g = torch.Generator().manual_seed(n * 7 + count)
    base, *models = ((torch.randint(-4, 5, (n,), generator=g) / 4).bfloat16() for _ in range(count + 1))
    weights = torch.randn(count, generator=g).tolist()
    kwargs = {"normalize": normalize, "elect": elect}
    want = consensus_merge(base, models, weights, density, backend="reference", **kwargs)
    assert_same_bits(consensus_merge(base, models, weights, density, backend="cpu", **kwargs), want)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"density": 1.2}, "density 1.2"),
        ({"density": [0.1]}, "density has 1 entries for 2 models"),
        ({"weight": [1.0]}, "weight has 1 entries"),
        ({"trim": "magnitude"}, "trim 'magnitude'"),
        ({"elect": "max"}, "elect 'max'"),
        ({"rescale": True}, "rescale True"),
        ({"density": 0.5, "offset": 8}, "needs the whole tensor's thresholds"),
        ({"thresholds": [None]}, "1 entries for 2 models"),
        ({"thresholds": [None, (1, 2)]}, r"thresholds\[1\] must be a Threshold"),
        ({"thresholds": [Threshold(0, 0)] * 2, "trim": "random"}, "thresholds need trim"),
        ({"trim": "rank_random", "density": 0.1, "epsilon": 0.2}, "strictly inside"),
        ({"models": []}, "empty"),
        ({"models": [torch.zeros(3), torch.zeros(4)]}, r"models\[0\] has shape"),
        ({"models": [torch.zeros(4, dtype=torch.int32)] * 2}, "int32"),
        ({"out": torch.zeros(5)}, "out has shape"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_input_is_named(kwargs, match, backend):
    arguments = {"base": torch.zeros(4), "models": [torch.zeros(4)] * 2, "weight": 1.0, "density": 1.0} | kwargs
    positional = [arguments.pop(k) for k in ("base", "models", "weight", "density")]
    with pytest.raises((ValueError, TypeError), match=match):
        consensus_merge(*positional, backend=backend, **arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_window_that_drops_everything_keeps_nothing(backend):
    base, model = torch.zeros(8), torch.arange(1.0, 9.0)
    got = consensus_merge(base, [model], 1.0, 0.0, trim="window", gamma=1.0, backend=backend)
    assert got.tolist() == [0.0] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("trim", ["topk", "random"])
def test_register_loops_agree_with_the_reference(dtype, count, trim):
    """Every number of models of the single loop, odd ends, misaligned outputs and offsets, with and without election."""
    g = torch.Generator().manual_seed(count)
    n = 5003
    base = torch.randn(n, generator=g) * 0.02
    models = [(base + torch.randn(n, generator=g) * 0.002).to(dtype) for _ in range(count)]
    base = base.to(dtype)
    weights = [0.5 - 0.17 * i for i in range(count)]
    rules = topk_thresholds(base, models, 0.3) if trim == "topk" else None
    for elect, normalize, offset in (("sum", True, 0), ("sum", False, 8), (None, True, 0), (None, False, 13)):
        given = None if rules is None else [Threshold(r.key, r.index + offset) for r in rules]
        kwargs = {
            "trim": trim,
            "elect": elect,
            "normalize": normalize,
            "thresholds": given,
            "offset": offset,
            "scale": 0.7,
        }
        want = consensus_merge(base, models, weights, 0.3, backend="reference", **kwargs)
        room = torch.empty(n + 5, dtype=dtype)
        for shift in (0, 5):
            got = consensus_merge(base, models, weights, 0.3, backend="cpu", out=room[shift : shift + n], **kwargs)
            assert_same_bits(got, want)

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import _native
from fastmerge.ops import ThresholdStream, topk_thresholds
from fastmerge.ops.threshold import KEEP_NONE, Threshold, Window, kept, reference_thresholds

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def stream_thresholds(base, models, density, gamma=None, chunk=7001, sample=True, order=1):
    n = models[0].numel()
    compute = torch.float64 if models[0].dtype == torch.float64 else torch.float32
    stream = ThresholdStream(n, density, models=len(models), gamma=gamma, compute=compute)
    passes = 0
    if sample:
        for a, b in stream.sample_spans():
            stream.add_sample(None if base is None else base[a:b], [m[a:b] for m in models])
    while spans := stream.advance():
        passes += 1
        for start, stop in spans:
            for a in list(range(start, stop, chunk))[::order]:
                b = min(stop, a + chunk)
                stream.feed(None if base is None else base[a:b], [m[a:b] for m in models], a)
    return stream.finish(), passes


def hard_inputs(dtype, n):
    g = torch.Generator().manual_seed(n)
    normal = torch.randn(n, generator=g)
    special = normal.clone()
    special[torch.rand(n, generator=g) < 0.5] = float("nan")
    special[torch.rand(n, generator=g) < 0.1] = float("-inf")
    rare = torch.zeros(n)
    rare[-3:] = 1.0
    return {
        "normal": normal.to(dtype),
        "few values": (torch.randint(-3, 4, (n,), generator=g) / 8).to(dtype),
        "constant": torch.full((n,), -0.5, dtype=dtype),
        "sorted": normal.sort().values.to(dtype),
        "growing": (normal * torch.linspace(0, 1, n) ** 4).to(dtype),
        "special": special.to(dtype),
        "rare": rare.to(dtype),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 7, 32769, 100_003])
def test_exact_on_hard_inputs(dtype, n):
    for what, x in hard_inputs(dtype, n).items():
        for density in (1e-6, 0.25, 0.75):
            want = reference_thresholds(None, [x], [density])
            assert topk_thresholds(None, [x], density) == want, (what, density)
            assert int(kept(x, want[0]).sum()) == max(1, int(density * n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deltas_of_several_models_and_windows(dtype):
    g = torch.Generator().manual_seed(0)
    base = (torch.randn(150_001, generator=g) * 0.02).to(dtype)
    models = [(base.float() + torch.randn(150_001, generator=g) * 0.002).to(dtype) for _ in range(3)]
    densities = [0.2, 1.0, 0.0]
    assert topk_thresholds(base, models, densities) == reference_thresholds(base, models, densities)
    rules = topk_thresholds(base, models, densities, gamma=0.1)
    assert rules == reference_thresholds(base, models, densities, [0.1] * 3)
    assert [type(r) for r in rules] == [Window] * 3
    assert [int(kept(m.float() - base.float(), r).sum()) for m, r in zip(models, rules, strict=True)] == [
        30000,
        150001,
        0,
    ]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("chunk", "order"), [(7001, 1), (65536, -1), (100_003, 1)])
def test_stream_gives_the_same_rules_in_any_chunks(dtype, chunk, order):
    for what, x in hard_inputs(dtype, 100_003).items():
        got, passes = stream_thresholds(None, [x, x * 2], 0.25, gamma=0.05, chunk=chunk, order=order)
        assert got == reference_thresholds(None, [x, x * 2], [0.25, 0.25], [0.05, 0.05]), what
        assert passes <= 3 or what in ("sorted", "growing"), what


def test_stream_without_or_with_a_misleading_sample():
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(1))
    want = reference_thresholds(None, [x], [0.2])
    got, passes = stream_thresholds(None, [x], 0.2, sample=False)
    assert got == want
    assert passes == 4  # two digits, the ties of the key, one piece
    stream = ThresholdStream(x.numel(), 0.2, models=1)
    stream.add_sample(None, [torch.linspace(5, 6, 1000)])
    while spans := stream.advance():
        for a, b in spans:
            stream.feed(None, [x[a:b]], a)
    assert stream.finish() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threads_feed_lanes_of_their_own(dtype):
    n, step, lanes = 300_007, 4096, 3
    for what, x in hard_inputs(dtype, n).items():
        want = reference_thresholds(None, [x, 3 * x], [0.2, 0.7])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        stream = ThresholdStream(n, [0.2, 0.7], models=2, compute=wide, lanes=lanes)
        for a, b in stream.sample_spans():
            stream.add_sample(None, [x[a:b], 3 * x[a:b]])
        while spans := stream.advance():

            def feed(lane, spans=spans, x=x, stream=stream):
                pieces = [(i, min(i + step, b)) for a, b in spans for i in range(a, b, step)]
                for a, b in pieces[lane::lanes]:
                    stream.feed(None, [x[a:b], 3 * x[a:b]], a, lane=lane)

            with ThreadPoolExecutor(lanes) as pool:
                list(pool.map(feed, range(lanes)))
        assert stream.finish() == want, what
    with pytest.raises(ValueError, match="no lane 3"):
        ThresholdStream(9, 0.5, models=1, lanes=3).feed(None, [torch.zeros(9)], 0, lane=3)


def test_stream_over_a_concatenation_gives_each_tensor_its_rule():
    g = torch.Generator().manual_seed(2)
    parts = [torch.randint(-9, 10, (n,), generator=g).float() for n in (40_000, 5, 60_000)]
    whole = torch.cat(parts)
    rules, _ = stream_thresholds(None, [whole], 0.3)
    want = kept(whole, rules[0])
    assert int(want.sum()) == int(0.3 * whole.numel())
    offsets = [0, 40_000, 40_005]
    got = [kept(p, rules[0].shifted(o)) for p, o in zip(parts, offsets, strict=True)]
    assert torch.equal(torch.cat(got), want)


def test_stream_without_the_native_module(monkeypatch):
    x = torch.randn(40_000, generator=torch.Generator().manual_seed(3))
    want = reference_thresholds(None, [x], [0.2])
    monkeypatch.setattr(_native, "why_not", lambda: "not built")
    assert stream_thresholds(None, [x], 0.2)[0] == want
    assert topk_thresholds(None, [x], 0.2) == want


def test_stream_notices_what_was_not_fed():
    stream = ThresholdStream(1000, 0.2, models=1)
    assert stream.advance() == [(0, 1000)]
    stream.feed(None, [torch.randn(400)], 0)
    with pytest.raises(ValueError, match="400 elements were fed, 1000"):
        stream.advance()
    with pytest.raises(ValueError, match="outside the tensor"):
        stream.feed(None, [torch.randn(400)], 800)
    with pytest.raises(ValueError, match="2 models, expected 1"):
        stream.feed(None, [torch.randn(4)] * 2, 0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=60),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_property_rules_keep_exactly_the_largest(values, density, gamma):
    x = torch.tensor(values, dtype=torch.float32)
    assert topk_thresholds(None, [x], density) == reference_thresholds(None, [x], [density])
    assert topk_thresholds(None, [x], density, gamma=gamma) == reference_thresholds(None, [x], [density], [gamma])


def test_golden_rules():
    x = torch.tensor([1.0, -3.0, 2.0, 3.0, -2.0])
    (rule,) = topk_thresholds(None, [x], 0.6)  # 3 of 5: both 3s and the first 2
    assert rule == Threshold(0x40000000, 2)
    assert kept(x, rule).tolist() == [False, True, True, True, False]
    assert kept(x[2:], rule, offset=2).tolist() == [True, True, False]
    assert topk_thresholds(None, [x], 0.0) == [KEEP_NONE]
    assert topk_thresholds(None, [x], 1.0) == [None]
    (window,) = topk_thresholds(None, [x], 0.4, gamma=0.2)  # drop one 3 (the first ranks higher), keep the next two
    assert kept(x, window).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("wanted", [0.199, 0.05, 0.9])
def test_a_stream_may_be_aimed_at_other_counts_after_the_first_pass(wanted):
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(3)).bfloat16()
    stream = ThresholdStream(x.numel(), 0.2, models=1)
    for a, b in stream.sample_spans():
        stream.add_sample(None, [x[a:b]])
    passes = 0
    while spans := stream.advance():
        for a, b in spans:
            stream.feed(None, [x[a:b]], a)
        if not passes:
            stream.aim([int(wanted * x.numel())])
        passes += 1
    assert stream.finish() == reference_thresholds(None, [x], [wanted])
    assert passes <= 2 or wanted != 0.199


def test_a_stream_can_not_be_aimed_at_nothing_or_too_early():
    stream = ThresholdStream(100_000, 0.2, models=1)
    for count in (0, 100_000):
        with pytest.raises(ValueError, match="can not be aimed at"):
            stream.aim([count])
    with pytest.raises(ValueError, match="too late, or too far"):
        stream.aim([5])
    with pytest.raises(ValueError, match="can not be aimed at"):
        ThresholdStream(100_000, 0.2, models=1, gamma=0.1).aim([5])

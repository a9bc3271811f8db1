import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge import _native
from fastmerge.ops import topk_mask


def test_backends_agree_with_the_reference():
    assert check_op(topk_mask, backends=["cpu"]) >= 100


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_golden_table(backend):
    nan = float("nan")
    x = torch.tensor([[1.0, -3.0, 3.0, 0.0], [0.5, 0.5, -0.5, nan]])
    assert topk_mask(x, 0.25, backend=backend).tolist() == [[False, True, False, False], [False, False, False, True]]
    assert topk_mask(x, 0.5, dim=-1, backend=backend).tolist() == [
        [False, True, True, False],
        [True, False, False, True],
    ]
    assert topk_mask(x, 0.5, dim=0, backend=backend).tolist() == [
        [True, True, True, False],
        [False, False, False, True],
    ]
    assert int(topk_mask(torch.zeros(10), 0.29, backend=backend).sum()) == 2  # int(0.29 * 10), not rounding
    assert int(topk_mask(torch.zeros(100), 0.29, backend=backend).sum()) == 28  # 0.29 * 100 is 28.999... in double


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads, monkeypatch):
    x = torch.randn(300_001, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = topk_mask(x, 0.2, backend="reference")
    rows = x[:300_000].view(1000, 300)
    want_rows = topk_mask(rows, 0.2, dim=-1, backend="reference")
    monkeypatch.setattr(_native, "threads", lambda: threads)
    assert_same_bits(topk_mask(x, 0.2, backend="cpu"), want)
    assert_same_bits(topk_mask(rows, 0.2, dim=-1, backend="cpu"), want_rows)


def test_long_rows_and_streamed_stores():
    g = torch.Generator().manual_seed(2)
    rows = torch.randn(3, 50_000, generator=g)
    assert_same_bits(topk_mask(rows, 0.01, dim=-1), topk_mask(rows, 0.01, dim=-1, backend="reference"))
    big = torch.randint(-100, 101, (17_000_003,), generator=g, dtype=torch.int8).bfloat16()
    mask = topk_mask(big, 0.3)
    assert int(mask.sum()) == int(0.3 * big.numel())
    assert big[mask].abs().min() >= big[~mask].abs().max()


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((torch.zeros(2), 1.5), {}, "density 1.5"),
        ((torch.zeros(2), float("nan")), {}, "density nan"),
        ((torch.zeros(2), 0.5), {"dim": 1}, "dim 1 is out of range"),
        ((torch.zeros(2, dtype=torch.bool), 0.5), {}, "torch.bool"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_input_is_named(args, kwargs, match, backend):
    with pytest.raises((ValueError, TypeError), match=match):
        topk_mask(*args, backend=backend, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_out_is_filled_whatever_the_path_and_its_alignment(dtype, threads):
    g = torch.Generator().manual_seed(11)
    for x in (torch.randn(400_003, generator=g), torch.randint(-9, 9, (90_001,), generator=g) / 8):
        x = x.to(dtype)
        want = topk_mask(x, 0.2, backend="reference")
        for shift in (0, 3):
            room = torch.ones(x.numel() + 8, dtype=torch.bool)
            out = room[shift : shift + x.numel()]
            with _native.limit_threads(threads):
                assert topk_mask(x, 0.2, out=out, backend="cpu") is out
            assert_same_bits(out, want)
            assert bool(room[:shift].all())
            assert bool(room[shift + x.numel() :].all())


def test_out_of_the_wrong_kind_is_named():
    x = torch.zeros(4, 4)
    for out in (torch.empty(4, 4), torch.empty(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="out is"):
            topk_mask(x, 0.5, out=out)

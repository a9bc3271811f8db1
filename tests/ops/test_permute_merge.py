import pytest
import torch
from checks import assert_same_bits, check_op

from fastmerge.ops import permute, permute_merge, weighted_sum


def test_backends_agree_with_the_reference():
    assert check_op(permute_merge, backends=["cpu"]) >= 110


def test_golden_table():
    base, other = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    assert permute_merge(base, other, {0: [1, 0]}).tolist() == [[15.5, 21.0], [6.5, 12.0]]
    assert permute_merge(base, other, {1: [1, 0]}, 0.25).tolist() == [[5.75, 4.0], [12.25, 10.5]]
    assert permute_merge(base, other, {}, 1.0).tolist() == other.tolist()


def test_equals_the_two_steps():
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(64, 48, generator=g), torch.randn(64, 48, generator=g)
    perms = {0: torch.randperm(64, generator=g), 1: torch.randperm(6, generator=g)}
    want = weighted_sum(None, [base, permute(other, perms)], [1 - 0.3, 0.3])
    assert_same_bits(permute_merge(base, other, perms, 0.3), want)


def test_many_models_into_a_float32_running_mean():
    g = torch.Generator().manual_seed(0)
    models = [torch.randn(33, generator=g).bfloat16() for _ in range(3)]
    perms = [torch.randperm(33, generator=g) for _ in range(2)]
    mean = permute_merge(models[0], models[1], {0: perms[0]}, 1 / 2, dtype=torch.float32)
    assert permute_merge(mean, models[2], {0: perms[1]}, 1 / 3, out=mean) is mean
    want = (models[0].double() + models[1][perms[0]].double() + models[2][perms[1]].double()) / 3
    torch.testing.assert_close(mean.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_input_is_named(backend):
    a, b = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match=r"other\[0\] has shape \(4,\)"):
        permute_merge(a, b, {}, backend=backend)
    with pytest.raises(ValueError, match="but not other"):
        permute_merge(a, other := torch.zeros(3), {0: [2, 1, 0]}, out=other, backend=backend)
    with pytest.raises(ValueError, match="tensor 'fc', axis 0: not a permutation"):
        permute_merge(a, torch.zeros(3), {0: [1, 1, 0]}, names="fc", backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight", [0.5, 0.3, -2.0])
def test_every_kind_of_bits_in_tiles_and_rows(dtype, weight):
    """Random bits: NaN, Inf, subnormals, overflow; permuted columns (tiles with a rest both ways) and rows alone."""
    g = torch.Generator().manual_seed(1)
    word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low, high = torch.iinfo(word).min, torch.iinfo(word).max
    base, other = (torch.randint(low, high, (75, 613), generator=g, dtype=word).view(dtype) for _ in range(2))
    rows, columns = torch.randperm(75, generator=g), torch.randperm(613, generator=g)
    for perms in ({0: rows}, {1: columns}, {0: rows, 1: columns}):
        got = permute_merge(base, other, perms, weight, backend="cpu")
        assert_same_bits(got, permute_merge(base, other, perms, weight, backend="reference"))
        assert torch.equal(
            permute(other, perms, backend="cpu").view(word), permute(other, perms, backend="reference").view(word)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_past_the_caches_and_within_give_the_same_bits(dtype, monkeypatch):
    from fastmerge.ops import _permute_call

    g = torch.Generator().manual_seed(1)
    base, other = (torch.randn(65, 333, generator=g).to(dtype) for _ in range(2))
    perms = {0: torch.randperm(65, generator=g), 1: torch.randperm(333, generator=g)}
    within = permute_merge(base, other, perms), permute(other, perms)
    monkeypatch.setattr(_permute_call, "STREAM_BYTES", 0)
    assert_same_bits(permute_merge(base, other, perms), within[0])
    assert_same_bits(permute(other, perms), within[1])

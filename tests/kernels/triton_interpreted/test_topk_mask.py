from __future__ import annotations

import pytest
import torch
from checks import LAYOUTS, map_tensors, poisoned_empty
from fastmerge.triton_kernels import _select
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_guard import SECTOR, Guard, memory_guard

from fastmerge import _triton
from fastmerge.ops import topk_mask
from fastmerge.ops.threshold import kept_count

kernel = _triton.kernel("topk_mask")


@pytest.fixture
def small(monkeypatch):
    """Samples and lists so small that 20000 elements need two levels, and 4000 one."""
    monkeypatch.setattr(_select, "SAMPLE", 1024)
    monkeypatch.setattr(_select, "ROOM", 2048)


@pytest.mark.parametrize("case", topk_mask.cases, ids=lambda c: c.name)
def test_agrees_with_the_reference_bit_for_bit(case):
    for dtype in case.dtypes:
        args, kwargs = case.make(torch.Generator().manual_seed(1), dtype)
        want = topk_mask(*args, backend="reference", **kwargs)
        layouts = LAYOUTS if dtype == torch.bfloat16 else ["contiguous"]  # what lies where does not depend on the dtype
        for layout in layouts:
            with poisoned_empty():
                got = topk_mask(*map_tensors(args, LAYOUTS[layout]), backend="triton", **kwargs)
            assert torch.equal(got, want), f"{case.name}, {dtype}, {layout}"


def check(x: torch.Tensor, density: float, block: int | None = None) -> None:
    out = torch.full(x.shape, 7, dtype=torch.uint8).view(torch.bool)
    kernel(x, kept_count(density, x.shape[-1]), out, block=block)
    assert torch.equal(out, topk_mask(x, density, dim=-1, backend="reference"))


def watched(x: torch.Tensor, density: float, block: int | None = None) -> Guard:
    out = torch.full(x.shape, 7, dtype=torch.uint8).view(torch.bool)
    with memory_guard(x, out) as guard:
        kernel(x, kept_count(density, x.shape[-1]), out, block=block)
    assert torch.equal(out, topk_mask(x, density, dim=-1, backend="reference"))
    return guard


def values(kind: str, n: int = 20_001) -> torch.Tensor:
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(1))
    if kind == "three values":
        return x.sign() * (x.abs() > 0.6)
    if kind == "constant":
        return torch.full_like(x, -2.5)
    if kind == "zeros and few others":  # the 0.2-th quantile lies between zeros and what is far from them
        return x * (torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.2)
    if kind == "NaN":
        return x.masked_fill(x > 0.5, float("nan"))
    return x if kind == "normal" else x.to(getattr(torch, kind))


KINDS = ["normal", "three values", "constant", "zeros and few others", "NaN", "bfloat16", "float16", "float64"]


@pytest.mark.parametrize("kind", KINDS)
def test_selection_over_many_blocks_and_levels(kind, small, launches):
    x = values(kind)
    for density in (0.0001, 0.2, 0.9, 0.99995):
        check(x, density, 4096)
    assert launches.count("collect_kernel") == 4
    assert launches.count("refine_kernel") >= 2
    assert launches.count("whole_kernel") == 4  # always launched: the device decides


@pytest.mark.parametrize("kind", ["normal", "bfloat16", "float64"])
def test_selection_with_the_sizes_of_a_gpu(kind, launches):
    x = values(kind, 150_001)
    for density in (0.0001, 0.3):
        check(x, density)
    assert launches == ["bracket_kernel", "collect_kernel", "settle_kernel", "whole_kernel", "mask_kernel"] * 2


@pytest.mark.parametrize("kind", ["constant", "zeros and few others", "two values"])
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5])
def test_ties_need_no_second_look_at_the_data(kind, density, small):
    """Rules divide equals by their index, so that lists stay short however many are equal."""
    x = (values("normal") > 0.8).bfloat16() + 1 if kind == "two values" else values(kind).bfloat16()
    guard = watched(x, density, 4096)
    assert not any(a.kernel == "whole_kernel" and a.lanes > 1 for a in guard.accesses)
    assert guard.touched(x) <= 1.2 * x.numel() + 2 * _select.SAMPLE


def test_indices_of_64_bits(small, monkeypatch):
    """As for segments of 2^31 elements and more."""
    monkeypatch.setattr(_select, "_WIDE", 1)
    for kind in ("three values", "normal"):
        check(values(kind), 0.2, 4096)


def sampled_places(n: int, sample: int) -> torch.Tensor:
    """The elements that a sample of one segment reads, written a second time."""
    log = sample.bit_length() - 1
    piece = torch.arange(sample)
    mixed = (piece ^ n) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return ((piece << (32 - log) | mixed >> log) * n) >> 32


def test_a_sample_takes_one_element_of_each_equal_piece(small):
    for n in (4096, 20_001, 2**31 - 1):
        places = sampled_places(n, _select.SAMPLE)
        pieces = torch.arange(_select.SAMPLE + 1) * n // _select.SAMPLE
        assert (places >= pieces[:-1]).all()
        assert (places <= pieces[1:]).all()
        inside = (places + 0.5) / (n / _select.SAMPLE) - torch.arange(_select.SAMPLE)
        assert 0.45 < inside.mean() < 0.55  # scattered: not always the same place of a piece
        assert inside.std() > 0.25
    x = torch.randn(1, 20_001)
    guard = watched(x, 0.2, 4096)
    begin = x.data_ptr()
    read = [
        a
        for a in guard.accesses
        if a.kernel == "bracket_kernel" and begin <= int(a.addresses[0]) < begin + 4 * x.numel()
    ]
    assert len(read) == 2  # one for each end
    assert (torch.from_numpy((read[0].addresses - begin).astype("int64")) // 4).equal(
        sampled_places(20_001, _select.SAMPLE)
    )


@pytest.mark.parametrize("sample", ["zeros", "huge"])
@pytest.mark.parametrize("kind", ["normal", "bfloat16", "float64", "three values"])
def test_a_sample_that_misleads_is_found_out(sample, kind, small):
    x = values(kind)
    places = sampled_places(20_001, _select.SAMPLE // (2 if kind == "float64" else 1))
    x[0, places] = 0 if sample == "zeros" else 1e4
    guard = watched(x, 0.3, 4096)
    whole = [a for a in guard.accesses if a.kernel == "whole_kernel" and a.lanes > 1 and a.kind == "load"]
    assert whole, "all elements were not needed"


def test_a_list_that_is_too_long_is_found_out(small, monkeypatch):
    """Such a bracket is not expected: the room is made smaller instead."""
    monkeypatch.setattr(_select, "_room", lambda n, sample: 100)
    x = values("three values")
    guard = watched(x, 0.2, 4096)
    assert any(a.kernel == "whole_kernel" and a.lanes > 1 for a in guard.accesses)


def test_levels_follow_from_size_and_density():
    assert [_select.levels(n, n // 5, False) for n in (2048, 32_768, 32_769, 1 << 19, 1 << 24, 1 << 26, 1 << 31)] == [
        0, 0, 1, 1, 2, 3, 4]  # fmt: skip
    assert _select.levels(1 << 24, 1 << 23, True) == 3  # half the sample, half the room


def test_long_rows_are_segments_of_one_launch(small, launches):
    check(torch.randn(3, 17_000, generator=torch.Generator().manual_seed(2)), 0.1)
    assert launches.count("collect_kernel") == 1


@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), float("nan"), 1e-42]), min_size=2, max_size=40),
    density=st.floats(0.01, 0.99),
)  # fmt: skip
def test_few_values_many_ties(values, density):
    check(torch.tensor([values]), density)  # one row in registers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_select, "SAMPLE", 256)
        patch.setattr(_select, "ROOM", 512)
        patch.setattr("fastmerge.triton_kernels.topk_mask.ROW", 1024)
        check(torch.tensor([values * 200])[:, :4200], density, 1024)


def test_accesses_are_clean_and_the_traffic_is_counted():
    size = 1 << 20
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(3))
    out = torch.empty(x.shape, dtype=torch.bool)
    k = kept_count(0.2, size)
    with memory_guard(x, out) as guard:
        kernel(x, k, out)
    assert guard.launches.count("refine_kernel") == 1
    candidates = next(a for a in guard.accesses if a.kernel == "mask_kernel" and a.kind == "load" and a.lanes > 1)
    assert candidates.addresses.size
    # One read of x, its samples and the elements between, and the mask.
    again = 2 * _select.SAMPLE + 0.04 * size
    assert size <= guard.touched(x) - 2 * _select.SAMPLE
    assert guard.touched(x) <= size + again
    assert guard.bytes_moved() - out.numel() <= 1.3 * 4 * size
    # In whole sectors of 32 bytes, which is what scattered accesses move: below two reads and the mask.
    assert guard.sectors() * SECTOR - out.numel() <= 2 * 4 * size
    assert guard.full_sector_share(x, out, kernel="collect_kernel", whole=True) >= 0.95
    assert int(out.sum()) == k
    assert x[out].abs().min() > x[~out].abs().max()


def test_a_row_in_registers_is_read_once():
    x = torch.randn(7, 1000)
    out = torch.empty(x.shape, dtype=torch.bool)
    with memory_guard() as guard:
        kernel(x, 100, out)
    assert guard.bytes_moved() == 7 * 1000 * (4 + 1)

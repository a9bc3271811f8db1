from __future__ import annotations

import pytest
import torch
from checks import LAYOUTS, map_tensors, poisoned_empty
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.triton_guard import memory_guard

from fastmerge import _triton
from fastmerge.ops import topk_mask
from fastmerge.ops.threshold import kept_count

kernel = _triton.kernel("topk_mask")


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


def check(x: torch.Tensor, density: float, block: int | None = None, sampled: bool = False) -> None:
    out = torch.full(x.shape, 7, dtype=torch.uint8).view(torch.bool)
    kernel(x, kept_count(density, x.shape[-1]), out, block=block, sampled=sampled)
    assert torch.equal(out, topk_mask(x, density, dim=-1, backend="reference"))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["normal", "three values", "constant", "bfloat16", "float16", "float64"])
def test_selection_over_many_blocks(kind, sampled):
    x = torch.randn(1, 20_001, generator=torch.Generator().manual_seed(1))
    if kind == "three values":
        x = x.sign() * (x.abs() > 0.6)
    elif kind == "constant":
        x = torch.full_like(x, -2.5)  # more candidates than there is room for: the data is read again
    elif kind != "normal":
        x = x.to(getattr(torch, kind))
    for density in (0.0001, 0.2, 0.9, 0.99995):
        check(x, density, 4096, sampled)


@pytest.mark.parametrize("sampled", [False, True])
def test_bins_may_be_counted_in_parts(sampled, monkeypatch):
    """As on AMD."""
    from fastmerge.triton_kernels import _select

    monkeypatch.setattr(_select, "bins_at_once", lambda: 1024)
    x = torch.randn(1, 20_001, generator=torch.Generator().manual_seed(5))
    x[0, ::3] = x[0, 0]  # ties, decided by the index
    for density in (0.01, 0.6):
        check(x, density, 4096, sampled)


def sampled_places(n: int, k: int) -> torch.Tensor:
    """The elements that a sample of one segment reads."""
    blocks, stride, _, _ = _triton.kernel("_select", "_sample")(n, k, 4096)
    run = torch.arange(blocks * 512)
    scatter = ((run * 0x2545F491) >> 8) & 0xFFFFFF
    return ((run * stride + (scatter * stride >> 24)) * 8)[:, None] + torch.arange(8)


@pytest.mark.parametrize("sample", ["zeros", "huge"])
def test_a_sample_that_misleads_is_found_out(sample):
    n = 50_000
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(4))
    places = sampled_places(n, kept_count(0.2, n))
    assert places.max() < n
    assert places.unique().numel() == places.numel()
    x[0, places.flatten()] *= 0 if sample == "zeros" else 1e9
    with memory_guard(x) as guard:
        check(x, 0.2, None, sampled=True)
    whole = [a for a in guard.accesses if a.kernel == "histogram_kernel" and a.lanes > 1 and a.kind == "load"]
    assert whole, "the histogram of all elements was not needed"


def test_large_segments_are_sampled():
    from fastmerge.triton_kernels import _select

    segment = _select.Segment(None, torch.empty(1 << 24), 1000)
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        state = torch.zeros(1, 16, dtype=torch.int64)
        patch.setattr(_select, "_select_group", lambda segments, block, sampled: chosen.append(sampled) or state)
        rules = torch.zeros(1, 2, dtype=torch.int64)
        _select.select([segment], rules, [0])
        _select.select([_select.Segment(None, segment.x[1:], 1000)], rules, [0])
    assert chosen == [True, False]


def test_long_rows_are_segments_of_one_launch():
    x = torch.randn(3, 17_000, generator=torch.Generator().manual_seed(2))
    with memory_guard(x) as guard:
        check(x, 0.1)
    assert guard.launches.count("collect_kernel") == 1


@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("inf"), float("nan"), 1e-42]), min_size=2, max_size=40),
    density=st.floats(0.01, 0.99),
)  # fmt: skip
def test_few_values_many_ties(values, density):
    check(torch.tensor([values]), density)  # one row in registers
    check(torch.tensor([values * 200])[:, :4200], density, 1024)


@pytest.mark.parametrize(("sampled", "size", "reads"), [(False, 1 << 20, 3), (True, 1 << 21, 2)])
def test_accesses_are_clean_and_the_traffic_is_counted(sampled, size, reads):
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(3))
    out = torch.empty(x.shape, dtype=torch.bool)
    k = kept_count(0.2, size)
    with memory_guard(x) as guard:
        kernel(x, k, out, sampled=sampled)
    assert guard.bytes_moved() - out.numel() <= (reads + 0.1) * 4 * size
    assert guard.touched(x) == reads * size + (2 * sampled_places(size, k).numel() if sampled else 0)
    assert guard.full_sector_share(x, out) >= 0.95
    assert int(out.sum()) == k
    assert x[out].abs().min() > x[~out].abs().max()


def test_a_row_in_registers_is_read_once():
    x = torch.randn(7, 1000)
    out = torch.empty(x.shape, dtype=torch.bool)
    with memory_guard() as guard:
        kernel(x, 100, out)
    assert guard.bytes_moved() == 7 * 1000 * (4 + 1)

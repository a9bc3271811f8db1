"""No merge depends on how many threads torch uses: rows long enough for torch to split them, and many short ones."""

import pytest
import torch
from checks import assert_same_bits

import fastmerge as fm
from fastmerge.methods import get, names

SHAPES = {"one long row": (1, 70001), "vector": (70001,), "matrix": (300, 257), "column": (70001, 1)}
VARIANTS = {
    "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {}],
    "model_stock": [{"filter_wise": True}, {}],
    "sce": [{"select_topk": 0.3}, {}],
    "slerp": [{"t": 0.3}],
    "nearswap": [{"t": 0.01}],
}
CASES = [
    (name, options)
    for name in names()
    if not get(name).needs_data and name not in ("mudsc", "free")  # one needs an architecture, one writes files
    for options in VARIANTS.get(name, [{}])
]


@pytest.fixture(scope="module")
def states():
    g = torch.Generator().manual_seed(3)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    return [base, *({n: t + 0.01 * torch.randn(t.shape, generator=g) for n, t in base.items()} for _ in range(3))]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_threads_do_not_change_a_bit(name, options, states):
    method = get(name)
    most = method.models[1] or 3
    models = states[1 : 1 + min(most, 3)]
    needs_weight = "weight" in method.parameters and method.parameters["weight"].default is fm.methods.REQUIRED
    given = {**({"weight": 0.5} if needs_weight else {}), **options}
    base = None if method.base == "ignored" else states[0]

    def merged(threads):
        torch.set_num_threads(threads)
        return fm.merge(name, base, models, **given)

    before = torch.get_num_threads()
    try:
        want = merged(1)
        for threads in (2, 3):
            for n, t in merged(threads).items():
                assert_same_bits(t, want[n], n)
    finally:
        torch.set_num_threads(before)

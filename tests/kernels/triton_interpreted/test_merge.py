"""A whole merge with FASTMERGE_BACKEND=triton, as a user would try it without a GPU."""

from __future__ import annotations

import pytest
import torch
from checks import assert_close, assert_same_bits

import fastmerge as fm


def models() -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    g = torch.Generator().manual_seed(5)
    shapes = {"layer.0.weight": (48, 64), "layer.1.weight": (33, 48), "layer.1.bias": (33,), "norm.weight": (64,)}
    base = {name: torch.randn(shape, generator=g) * 0.02 for name, shape in shapes.items()}
    tuned = [
        {name: (t + torch.randn(t.shape, generator=g) * 0.002).bfloat16() for name, t in base.items()} for _ in range(3)
    ]
    return {name: t.bfloat16() for name, t in base.items()}, tuned


@pytest.mark.parametrize(
    ("method", "parameters", "exact"),
    [
        ("ties", {"weight": [1.0, 0.5, 0.7], "density": 0.2}, True),
        ("task_arithmetic", {"weight": [0.3, 0.3, 0.3]}, True),
        ("fr", {}, False),
    ],
)
def test_a_whole_merge_equals_the_cpus(method, parameters, exact, monkeypatch):
    base, tuned = models()
    monkeypatch.setenv("FASTMERGE_BACKEND", "cpu")
    want = fm.merge(method, base, tuned, **parameters)
    monkeypatch.setenv("FASTMERGE_BACKEND", "triton")
    got = fm.merge(method, base, tuned, **parameters)
    assert got.keys() == want.keys()
    for name in want:
        if exact:
            assert_same_bits(got[name], want[name], name)
        else:
            assert_close(got[name], want[name], "fft", name)
    assert any(not torch.equal(got[name], base[name]) for name in base)

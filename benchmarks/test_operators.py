"""The declarations under pytest-benchmark: its statistics, its histograms, its --benchmark-compare.

python -m pytest -o addopts= benchmarks/test_operators.py --benchmark-only [-k topk_mask]      # make bench-pytest
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastmerge.benchmarks.declare import Bench, Variant
from fastmerge.benchmarks.run import gate, load, names

from fastmerge import ops
from fastmerge._dispatch import REFERENCE


def _calls() -> Iterator[Any]:
    for name in names():
        bench = load(name)
        for variant in bench.variants:
            if variant.quick:
                for backend in [*getattr(ops, name).backends, REFERENCE, *bench.rivals]:
                    yield pytest.param(bench, variant, backend, id=f"{name}-{variant.name}-{backend}")


@pytest.mark.parametrize(("bench", "variant", "backend"), _calls())
def test_operator(benchmark: Any, bench: Bench, variant: Variant, backend: str) -> None:
    op, device = getattr(ops, bench.op), torch.device("cpu")
    args, kwargs = variant.make(device)
    rival = bench.rivals.get(backend)
    if rival is None:
        reason = op.why_not(backend, *args, **kwargs)
        if reason is not None:
            pytest.skip(reason)
        assert gate(op, device) == []
        kwargs = {**kwargs, "backend": backend}
    benchmark.group = f"{bench.op}: {variant.name}"
    benchmark.extra_info |= {"bytes": variant.bytes, "flops": variant.flops}

    def setup() -> Any:
        if bench.setup is not None:
            bench.setup(args)
        return args, kwargs

    benchmark.pedantic(rival or op, setup=setup, rounds=5, warmup_rounds=1)

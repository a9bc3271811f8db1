"""Methods on the span of their inputs read them twice and no more: once for the Gram matrix, once to combine."""

import pytest
import torch
from checkpoints import save

import fastmerge as fm

PARAMETERS = {
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {"max_iter": 50, "tol": 1e-12},
    "model_stock": {},
    # for comparison: one read where nothing is looked for first
    "linear": {"weight": 0.5},
    "ram": {},
}
READS = {"linear": 1, "ram": 1}
COUNT = {"slerp": 1, "nuslerp": 2}
IGNORES_BASE = {"karcher", "linear"}


@pytest.mark.parametrize("method", PARAMETERS)
def test_bytes_read(method, tmp_path):
    g = torch.Generator().manual_seed(0)
    shapes = {"big": (700, 600), "small": (5, 7), "vector": (300,)}
    inputs = [{k: torch.randn(s, generator=g).bfloat16() for k, s in shapes.items()} for _ in range(5)]
    count = COUNT.get(method, 4)
    paths = [str(save(tmp_path / str(i), state)) for i, state in enumerate(inputs[: count + 1])]
    recipe = fm.Recipe.from_call(method, paths[0], paths[1:], PARAMETERS[method])
    report = fm.run(recipe, tmp_path / "out")
    models = count + (0 if method in IGNORES_BASE else 1)
    assert report.bytes_read == READS.get(method, 2) * models * sum(t.nbytes for t in inputs[0].values())
    assert report.bytes_written == sum(t.nbytes for t in inputs[0].values())

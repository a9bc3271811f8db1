"""Methods on the span of their inputs read them twice and no more: once for the Gram matrix, once to combine."""

import pytest
import torch
from checkpoints import save

import fastmerge as fm
from fastmerge import _native
from fastmerge.io.pipeline import Source
from fastmerge.methods import get
from fastmerge.methods._method import Header

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


LONG = (2, 3_000_000)


@pytest.mark.parametrize(
    ("method", "parameters", "line"),
    [
        ("model_stock", {"filter_wise": True}, 3_000_000),
        ("model_stock", {"filter_wise": False}, 0),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": False}, 3_000_000),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 3_000_000),
        ("nuslerp", {"nuslerp_flatten": True, "nuslerp_row_wise": True}, 0),
    ],
)
def test_lines_longer_than_a_chunk_count_as_memory(method, parameters, line, monkeypatch):
    monkeypatch.setattr(_native, "threads", lambda: 8)
    header = Header("w", LONG, torch.bfloat16, parameters, (0, 1))
    columns = 200 * line if parameters.get("nuslerp_row_wise") else 0
    assert (
        get(method).held_bytes([header]) == 2 * line * 4 * 4 + columns
    )  # two lines at once, two models, base and result


def test_plans_count_every_read(tmp_path):
    g = torch.Generator().manual_seed(0)
    paths = [str(save(tmp_path / str(i), {"w": torch.randn(700, 600, generator=g)})) for i in range(3)]
    for method, parameters in {
        "nuslerp": {"weight": 0.5, "nuslerp_flatten": False, "nuslerp_row_wise": True},
        "model_stock": {},
        "breadcrumbs": {"weight": 0.5, "density": 0.8, "gamma": 0.01, "rescale": True},
    }.items():
        recipe = fm.Recipe.from_call(method, paths[0], paths[1:], parameters)
        report = fm.run(recipe, tmp_path / method)
        samples = 0.2 * report.bytes_read  # and pieces that are looked at again
        assert report.estimate["bytes_moved"] >= report.bytes_read - samples + report.bytes_written, method


def test_copies_of_strided_tensors_go_when_they_are_merged(monkeypatch):
    released = []
    monkeypatch.setattr(Source, "release", lambda self: released.append(self))
    states = [{"a": torch.randn(5, 7).T, "b": torch.randn(4, 4).T} for _ in range(3)]
    fm.merge("linear", None, states, weight=0.5)
    assert [len([s for s in released if s.name == n]) for n in "ab"] == [3, 3]
    monkeypatch.undo()
    source = released[0]
    assert source.flat is source.flat
    source.release()
    assert source._flat is None

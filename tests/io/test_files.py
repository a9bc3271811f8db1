"""Pieces and spans of tensors out of files, by the native module and without it."""

import os

import pytest
import torch
from checks import assert_same_bits
from safetensors.torch import save_file

from fastmerge import _native
from fastmerge.errors import BadInput
from fastmerge.io.checkpoint import open_checkpoint
from fastmerge.io.files import Files


@pytest.fixture(params=["native", "python"])
def files(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(_native, "why_not", lambda: "not asked for")
    else:
        assert _native.why_not() is None
    opened = Files()
    yield opened
    opened.close()


@pytest.fixture
def state(tmp_path):
    state = {"a": torch.arange(1000).bfloat16(), "b": torch.randn(70, 10), "c": torch.tensor(3.0)}
    save_file(state, tmp_path / "model.safetensors")
    return state


def test_pieces_and_spans(files, state, tmp_path):
    ticks = []
    files.tick = lambda: ticks.append(files.bytes_read)
    entries = open_checkpoint(str(tmp_path)).entries
    a, b, c = torch.empty(300).bfloat16(), torch.empty(700), torch.empty(1)
    files.load([(entries["a"], 100, 400, a), (entries["b"], 0, 700, b), (entries["c"], 0, 1, c)])
    assert_same_bits(a, state["a"][100:400])
    assert_same_bits(b, state["b"].reshape(-1))
    assert_same_bits(c, state["c"].reshape(1))
    starts = [990, 0, 3, 3]
    spans = torch.empty(40).bfloat16()
    files.load_spans(entries["a"], starts, 10, spans)
    assert_same_bits(spans, torch.cat([state["a"][s : s + 10] for s in starts]))
    files.load([])
    files.load_spans(entries["a"], [], 10, spans[:0])
    assert files.bytes_read == 600 + 2800 + 4 + 80
    assert ticks == [3404, 3484, 3484, 3484]


def test_nan_and_inf_are_counted_on_the_way(files, tmp_path):
    x = torch.zeros(400_000).half()
    x[[0, 131_071, 131_072, 399_999]] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan]).half()
    save_file(
        {"x": x, "y": torch.full((3,), 65504.0).half(), "z": torch.tensor([1, torch.nan]).double()},
        tmp_path / "f.safetensors",
    )
    entries = open_checkpoint(str(tmp_path / "f.safetensors")).entries
    into = [
        torch.empty(n, dtype=d) for n, d in ((400_000, torch.half), (3, torch.half), (2, torch.double), (9, torch.half))
    ]
    pieces = [(entries["x"], 0, 400_000), (entries["y"], 0, 3), (entries["z"], 0, 2), (entries["x"], 1, 10)]
    pieces = [(*p, to) for p, to in zip(pieces, into, strict=True)]
    assert files.load(pieces, count=True) == (None if _native.why_not() else [4, 0, 1, 0])
    assert files.load(pieces) is None
    assert_same_bits(into[0], x)


def test_a_file_that_became_shorter(files, state, tmp_path):
    entries = open_checkpoint(str(tmp_path)).entries
    last = max(entries.values(), key=lambda e: e.begin)
    os.truncate(tmp_path / "model.safetensors", last.begin + last.nbytes - 1)
    numel = last.nbytes // last.dtype.itemsize
    into = torch.empty(numel, dtype=last.dtype)
    whole = next(e for e in entries.values() if e is not last)
    other = torch.empty(whole.nbytes // whole.dtype.itemsize, dtype=whole.dtype)
    with pytest.raises(BadInput, match="became shorter") as told:
        files.load([(whole, 0, other.numel(), other), (last, 0, numel, into)])
    assert str(tmp_path / "model.safetensors") in str(told.value)
    with pytest.raises(BadInput, match="became shorter"):
        files.load_spans(last, [0, numel - 1], 1, torch.empty(2, dtype=last.dtype))
    assert files.bytes_read == 0


def test_what_the_system_says(files, state, tmp_path):
    entry = open_checkpoint(str(tmp_path)).entries["a"]
    os.close(files.fd(entry.file))
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.load([(entry, 0, 10, torch.empty(10).bfloat16())])
    files._fds.clear()

"""The writer: layout, positional filling, journal and publishing."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from fastmerge.errors import BadInput
from fastmerge.io.journal import NAME, Journal
from fastmerge.io.writer import Writer, check_target, plan_layout, work_folder

TENSORS = [
    ("a", torch.float32, (4, 3), "s1"),
    ("b", torch.bfloat16, (5,), "s2"),
    ("c", torch.int64, (), "s1"),
    ("empty", torch.float16, (0, 2), "s2"),
]
VALUES = {
    "a": torch.arange(12, dtype=torch.float32).view(4, 3),
    "b": torch.tensor([1, -2, 3, 4, 5], dtype=torch.bfloat16),
    "c": torch.tensor(7),
    "empty": torch.empty(0, 2, dtype=torch.float16),
}


def layout(max_shard_bytes=None):
    return plan_layout(TENSORS, max_shard_bytes=max_shard_bytes, metadata={"format": "pt"})


def fill(writer, names="abc"):
    for name in names:
        flat = VALUES[name].reshape(-1)
        for i in reversed(range(flat.numel())):  # any order
            writer.put(name, i, flat[i : i + 1])
        writer.finish(name)


def start(out, **kwargs):
    return Writer.start(out, layout(), "job", **{"resume": False, "force": False, **kwargs})


def test_published_folder_holds_what_was_put(tmp_path):
    out = tmp_path / "out"
    writer = start(out)
    assert not out.exists()
    fill(writer)
    writer.finish("empty")
    writer.publish({"config.json": b"{}"}, force=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["a"] == "model-00001-of-00002.safetensors"
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in VALUES.values())
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(out / shard)[name], VALUES[name])


def test_shards_are_split_by_bytes():
    assert list(layout(10**9).sizes) == ["model.safetensors"]
    assert [s.shard[:11] for s in layout(50).slots.values()] == [
        "model-00001",
        "model-00002",
        "model-00002",
        "model-00002",
    ]


def test_unwritten_and_twice_written_bytes_are_caught(tmp_path):
    writer = start(tmp_path / "out")
    writer.put("a", 0, VALUES["a"].reshape(-1)[:6])
    with pytest.raises(RuntimeError, match="24 of 48 bytes"):
        writer.finish("a")
    writer.put("a", 0, VALUES["a"].reshape(-1)[:6])
    writer.put("a", 3, VALUES["a"].reshape(-1)[3:])
    with pytest.raises(RuntimeError, match="not written, or written twice"):
        writer.finish("a")
    with pytest.raises(RuntimeError, match="tensors were not written"):
        writer.publish({}, force=False)
    writer.close()
    assert not (tmp_path / "out").exists()


def test_resume_keeps_intact_tensors_and_redoes_damaged_ones(tmp_path):
    out = tmp_path / "out"
    writer = start(out)
    fill(writer)
    writer.close()
    slot = layout().slots["b"]
    with (work_folder(out) / slot.shard).open("r+b") as f:
        f.seek(slot.begin)
        f.write(b"\xff")
    with (work_folder(out) / NAME).open("a") as f:
        f.write('{"tensor": "empty", "pie')  # a line cut off by a crash
    resumed = start(out, resume=True)
    assert resumed.finished == {"a", "c"}
    fill(resumed, "b")
    resumed.finish("empty")
    resumed.publish({}, force=False)
    assert torch.equal(load_file(out / "model-00002-of-00002.safetensors")["b"], VALUES["b"])


def test_resume_refuses_another_job_and_a_second_process(tmp_path):
    out = tmp_path / "out"
    writer = start(out)
    with pytest.raises(BadInput, match="another process"):
        Journal.resume(work_folder(out), "job")
    writer.close()
    with pytest.raises(BadInput, match="was a different one"):
        Writer.start(out, layout(), "other job", resume=True, force=False)
    with pytest.raises(BadInput, match="no interrupted job"):
        Journal.resume(tmp_path, "job")


def test_targets_in_use_are_refused(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    check_target(out, 1, force=False, resume=False)
    (out / "x").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        check_target(out, 1, force=False, resume=False)
    check_target(out, 1, force=True, resume=False)
    with pytest.raises(BadInput, match="is a file"):
        check_target(out / "x", 1, force=False, resume=False)
    with pytest.raises(BadInput, match="GB free"):
        check_target(tmp_path / "new", 10**18, force=False, resume=False)
    work_folder(tmp_path / "new").mkdir()
    with pytest.raises(BadInput, match="interrupted job"):
        check_target(tmp_path / "new", 1, force=False, resume=False)


def test_full_disk_shows_before_work_and_leaves_nothing(tmp_path, monkeypatch):
    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BadInput, match="disk is full"):
        start(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_the_old_output_only_at_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    writer = start(out, force=True)
    fill(writer)
    writer.finish("empty")
    assert (out / "old").exists()
    writer.publish({}, force=True)
    assert not (out / "old").exists()
    assert (out / "model.safetensors.index.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]

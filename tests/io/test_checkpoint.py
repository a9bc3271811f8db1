"""Opening checkpoints: what is accepted, and that every damaged input is refused with its file and tensor named."""

import json
import struct

import pytest
import torch
from checkpoints import near, save, tiny_state
from checks import assert_same_bits
from safetensors.torch import load_file, save_file

from fastmerge.errors import BadInput
from fastmerge.io.checkpoint import from_state_dict, open_checkpoint
from fastmerge.io.safetensors import build_header, read_header


@pytest.mark.parametrize("shards", [1, 3])
def test_folder_is_seen_as_the_safetensors_library_sees_it(tmp_path, shards):
    state = tiny_state()
    checkpoint = open_checkpoint(save(tmp_path / "m", state, shards=shards))
    assert sorted(checkpoint.names()) == sorted(state)
    for name, t in state.items():
        assert checkpoint.dtype(name) == t.dtype
        assert checkpoint.shape(name) == tuple(t.shape)
    assert checkpoint.total_bytes == sum(t.nbytes for t in state.values())
    assert checkpoint.config()["num_hidden_layers"] == 3


def test_single_file_and_lone_file_of_any_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "anything.safetensors")
    assert open_checkpoint(tmp_path / "anything.safetensors").names() == ["a"]
    assert open_checkpoint(tmp_path).names() == ["a"]


def test_header_we_build_is_read_by_the_library(tmp_path):
    raw, places = build_header(
        [("x", torch.bfloat16, (2, 3)), ("ü", torch.float32, ()), ("e", torch.float16, (0,))], {"format": "pt"}
    )
    assert len(raw) % 8 == 0
    file = tmp_path / "f.safetensors"
    file.write_bytes(raw + bytes(16))
    assert {k: tuple(v.shape) for k, v in load_file(file).items()} == {"x": (2, 3), "ü": (), "e": (0,)}
    entries, metadata = read_header(file)
    assert {n: (e.begin, e.nbytes) for n, e in entries.items()} == places
    assert metadata == {"format": "pt"}


def _file(tmp_path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return file


def _tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "match"),
    [
        (b"", b"", None, "not valid JSON"),
        (b"{", b"", None, "not valid JSON"),
        (b"\xff\xfe", b"", None, "not valid JSON"),
        (b"[]", b"", None, "not a JSON object"),
        (b"{}", b"", 10**6, "claims 1000000 bytes, but the file ends"),
        (b"{}", b"", 2**63, "more than the format's limit"),
        ({"a": _tensor([2], 0, 8)}, b"1234", None, "'a' reaches to byte 8 of 4"),
        ({"a": _tensor([2], 0, 8), "b": _tensor([2], 4, 12)}, bytes(12), None, "'a' and 'b' overlap"),
        ({"a": _tensor([1], 4, 8)}, bytes(8), None, "4 unaccounted bytes before tensor 'a'"),
        ({"a": _tensor([1], 0, 4)}, bytes(8), None, "4 unaccounted bytes after"),
        ({"a": _tensor([3], 0, 8)}, bytes(8), None, r"'a' of shape \[3\] and dtype F32 needs 12 bytes"),
        ({"a": _tensor([-1], 0, 4)}, bytes(4), None, "'a'.*whole numbers"),
        ({"a": _tensor([1], 8, 4)}, bytes(8), None, "'a' reaches"),
        ({"a": _tensor([1], 0, 4, "F33")}, bytes(4), None, "'a' has unknown dtype 'F33'"),
        ({"a": _tensor([1], 0, 4, [])}, bytes(4), None, r"'a' has unknown dtype \[\]"),
        ({"a": {"shape": [1]}}, bytes(4), None, "'a'.*lacks"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            bytes(4),
            None,
            "'a' appears twice",
        ),
    ],
)
def test_damaged_headers_are_named(tmp_path, header, data, length, match):
    file = _file(tmp_path, header, data, length)
    with pytest.raises(BadInput, match=match) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert caught.value.remedy


def test_file_shorter_than_a_prefix(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(BadInput, match="3 bytes"):
        open_checkpoint(tmp_path)


def _indexed(tmp_path, weight_map):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "gone.safetensors"}, "'gone.safetensors', which is missing"),
        ({"a": "../other/x.safetensors"}, "outside the checkpoint's folder"),
        ({"a": "/etc/passwd"}, "outside the checkpoint's folder"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "lists tensor 'b', which is not in"),
        (["one.safetensors"], "needs a weight_map"),
        ({"a": 1}, "needs a weight_map"),
        ({"a": "\0"}, "which is missing"),
        ({"a": "x" * 300}, "which is missing"),
    ],
)
def test_bad_indexes_are_named(tmp_path, weight_map, match):
    with pytest.raises(BadInput, match=match) as caught:
        open_checkpoint(_indexed(tmp_path, weight_map))
    assert "index.json" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_an_index_that_names_the_wrong_shards(tmp_path, kind):
    names = ["one.safetensors", "two.safetensors"] if kind == "safetensors" else ["one.bin", "two.bin"]
    write, index = (save_file, "model.safetensors") if kind == "safetensors" else (torch.save, "pytorch_model.bin")
    for tensor, name in zip("ab", names, strict=True):
        write({tensor: torch.ones(2)}, tmp_path / name)
    index = tmp_path / f"{index}.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    assert open_checkpoint(tmp_path, allow_pickle=True).names() == ["a", "b"]
    index.write_text(json.dumps({"weight_map": dict(zip("ba", names, strict=True))}))
    with pytest.raises(BadInput, match=f"'b', which is not in {names[0]} but in {names[1]}"):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_tensor_in_two_shards(tmp_path):
    _indexed(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(BadInput, match=r"'a' is in two shards, one\.safetensors and two\.safetensors"):
        open_checkpoint(tmp_path)


def test_missing_folders_and_empty_ones(tmp_path):
    with pytest.raises(BadInput, match=r"no folder or file '\./tiny-nope'"):
        open_checkpoint("./tiny-nope")
    with pytest.raises(BadInput, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(BadInput, match="2 safetensors files and no index"):
        open_checkpoint(tmp_path)


def test_pickles_need_permission_and_load_weights_only(tmp_path):
    state = near(tiny_state(), 1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="--allow-pickle"):
        open_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(checkpoint.names()) == set(state) - {"lm_head.weight"}
    torch.save({"f": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="weights_only"):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_pickles_of_old_torch_are_read_and_still_weights_only(tmp_path):
    state = near(tiny_state(), 1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path, allow_pickle=True)
    assert checkpoint.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    for name in checkpoint.names():
        assert_same_bits(checkpoint.resident[name], state[name])
    torch.save({"f": print}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(BadInput, match="weights_only"):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_pickles_that_hold_something_else_or_a_tensor_twice(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="holds a list, not a state_dict") as caught:
        open_checkpoint(tmp_path, allow_pickle=True)
    assert "state_dict()" in caught.value.remedy
    (tmp_path / "pytorch_model.bin").unlink()
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.bin")
    weight_map = {"a": "one.bin", "b": "two.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadInput, match=r"'a' is in two shards, one\.bin and two\.bin"):
        open_checkpoint(tmp_path, allow_pickle=True)


def test_state_dict_entries_must_be_tensors():
    with pytest.raises(BadInput, match="'x' is a int"):
        from_state_dict({"x": 3}, "model 0")


def test_only_names_of_the_same_view_are_tied():
    x = torch.arange(12.0).view(3, 4)
    views = {
        "x": x, "the same": x.view(3, 4), "transposed": x.t(), "first row": x[0], "row at an offset": x[1],
        "first row again": x.view(-1)[:4], "negated": torch._neg_view(x), "other dtype": x.view(torch.int32),
        "empty": x[:0], "empty too": x[:0],
    }  # fmt: skip
    checkpoint = from_state_dict(views, "model 0")
    assert checkpoint.aliases == {"the same": "x", "first row again": "first row"}
    for name in set(views) - set(checkpoint.aliases):
        assert torch.equal(checkpoint.resident[name], views[name])
    assert not checkpoint.resident["negated"].is_neg()


def test_tensors_without_data_here_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    # All of them have the address 0, so that equal shapes would look tied.
    assert not from_state_dict({n: torch.empty(3, device="meta") for n in "ab"}, "model 0").aliases
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(BadInput, match="'a' holds no data"):
        from_state_dict({"a": freed}, "model 0")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {n: distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]) for n in "ab"}
        with pytest.raises(BadInput, match="'a' is a DTensor"):
            from_state_dict(state, "model 0")
    finally:
        torch.distributed.destroy_process_group()

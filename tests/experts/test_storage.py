import json

import numpy as np
import pytest
import torch
from checks import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmerge.errors import BadInput
from fastmerge.experts import Expert, Sparse, load, save
from fastmerge.experts.storage import decode, encode


def expert(density=0.01, dtype=torch.bfloat16, numel=200_000):
    g = torch.Generator().manual_seed(4)
    tensors = {}
    for name, shape in {"a.weight": (numel // 400, 400), "b.bias": (37,), "empty": (5, 5), "scalar": ()}.items():
        n = int(np.prod(shape, dtype=np.int64))
        k = 0 if name == "empty" else max(1, int(n * density))
        index = torch.randperm(n, generator=g)[:k].sort().values
        tensors[name] = Sparse(shape, index, torch.randn(k, generator=g).to(dtype), 0.0 if k == 0 else 6.5 + k)
    return Expert("cars", tensors, density, {"mu": "paper"})


@pytest.mark.parametrize("density", [0.0005, 0.01, 0.1, 0.4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_round_trip(tmp_path, density, dtype):
    want = expert(density, dtype)
    size = save(want, tmp_path / "experts" / "cars.safetensors")
    assert size == (tmp_path / "experts" / "cars.safetensors").stat().st_size
    got = load(tmp_path / "experts" / "cars.safetensors")
    assert (got.task, got.density, got.about, got.tensors.keys()) == ("cars", density, want.about, want.tensors.keys())
    for name, t in want.tensors.items():
        assert got.tensors[name].shape == t.shape
        assert got.tensors[name].mu == t.mu
        assert torch.equal(got.tensors[name].index, t.index)
        if t.index.numel():
            assert_same_bits(got.tensors[name].value, t.value)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 200_000), max_size=40), st.integers(0, 70_000))
def test_codings_invert(positions, more):
    index = np.array(sorted(positions), np.int64)
    numel = (int(index[-1]) + 1 if len(index) else 1) + more
    coding, data = encode(index, numel)
    assert np.array_equal(decode(coding, data, numel), index)


def test_the_smallest_coding_is_taken():
    dense = np.flatnonzero(np.arange(1000) % 3 == 0)
    assert encode(dense, 1000)[0] == "bits"
    assert encode(np.arange(0, 100_000, 100), 100_000)[0] == "gap8"
    assert encode(np.arange(0, 10_000_000, 1000), 10_000_000)[0] == "gap16"
    # Bytes at the edges of the escape: 254, 255 and 256 positions skipped.
    assert encode(np.array([254, 510, 767]), 100_000)[1].tolist() == [254, 255, 0, 255, 1]


def test_one_percent_in_bf16_takes_at_most_1_6_percent_of_the_model(tmp_path):
    want = expert(0.01, torch.bfloat16, 4_000_000)
    assert save(want, tmp_path / "e.safetensors") <= 0.016 * 2 * 4_000_000


def test_readable_without_this_package(tmp_path):
    """The reader docs/free.md shows, word for word but for the float32 view of bf16."""
    want = expert(0.02, torch.float32)
    save(want, tmp_path / "e.safetensors")
    with safe_open(tmp_path / "e.safetensors", "np") as f:
        about = json.loads(f.metadata()["tensors"])
        for name, t in about.items():
            delta = np.zeros(int(np.prod(t["shape"])), np.float32)
            for coding in ("gap8", "gap16", "bits"):
                if f"{name}.{coding}" not in f.keys():  # noqa: SIM118
                    continue
                data = f.get_tensor(f"{name}.{coding}")
                if coding == "bits":
                    index = np.flatnonzero(np.unpackbits(data, count=delta.size, bitorder="little"))
                else:
                    last = data != np.iinfo(data.dtype).max
                    index = (np.cumsum(data.astype(np.int64) + last) - 1)[last]
                delta[index] = t["mu"] * f.get_tensor(f"{name}.values")
            torch.testing.assert_close(torch.from_numpy(delta.reshape(t["shape"])), want.tensors[name].dense())


def test_damage_is_found(tmp_path):
    path = tmp_path / "e.safetensors"
    save(expert(), path)
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadInput, match="checksum"):
        load(path)
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match="can not read"):
        load(path)
    with pytest.raises(BadInput, match="can not read"):
        load(tmp_path / "missing.safetensors")
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(BadInput, match="not a fastmerge-expert"):
        load(path)


def test_inconsistent_lengths_are_found(tmp_path):
    from fastmerge.experts.storage import _checksum

    path = tmp_path / "e.safetensors"
    save(expert(), path)
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(path)
    tensors["a.weight.values"] = tensors["a.weight.values"][:-1].clone()
    save_file(tensors, path, metadata=metadata | {"xxh3": _checksum(tensors)})
    with pytest.raises(BadInput, match=r"'a\.weight': 2000 positions for 1999 values"):
        load(path)


@pytest.mark.parametrize(
    "change",
    [{"task": None}, {"density": "much"}, {"tensors": None}, {"tensors": "{"}, {"tensors": "[1]"}, {"tensors": '{"a.weight": {}}'}],
)  # fmt: skip
def test_metadata_that_describes_nothing_is_named(tmp_path, change):
    path = tmp_path / "e.safetensors"
    save(expert(), path)
    with safe_open(path, "pt") as f:
        metadata = f.metadata() | change
    save_file(load_file(path), path, metadata={k: v for k, v in metadata.items() if v is not None})
    with pytest.raises(BadInput, match="metadata lacks what describes it"):
        load(path)

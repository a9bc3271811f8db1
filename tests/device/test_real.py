"""The pipeline on a real GPU, over the cases that the recorded device runs: `make test-gpu`."""

import sys

import pytest
import torch
from checkpoints import load
from checks import assert_close
from device_cases import CASES, write_case

from fastmerge.engine import run

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[48, None], ids=["small chunks", "usual chunks"])
def chunks(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(sys.modules["fastmerge.device.budget"], "BLOCK", 16)
        monkeypatch.setattr(sys.modules["fastmerge.device.budget"], "CHUNK", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_the_cpu(tmp_path, name, threads):
    case = CASES[name]
    recipe = write_case(tmp_path, case)
    run(recipe, tmp_path / "cpu", device="cpu")
    report = run(recipe, tmp_path / "gpu", device="cuda", threads=threads)
    assert report.device == "cuda:0"
    for file in sorted((tmp_path / "cpu").glob("*.safetensors")):
        if case.exact:
            assert file.read_bytes() == (tmp_path / "gpu" / file.name).read_bytes(), file.name
    want, got = load(tmp_path / "cpu"), load(tmp_path / "gpu")
    for key, value in want.items():
        assert_close(got[key], value, "fft", what=f"{name}: {key}")


def test_memory_stays_within_max_vram(tmp_path):
    recipe = write_case(tmp_path, CASES["ties, bfloat16"])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    limit = 64 << 20
    run(recipe, tmp_path / "gpu", device="cuda", max_vram=limit)
    assert torch.cuda.max_memory_allocated() - before <= limit


def test_the_bus_is_measured():
    from fastmerge.device.cuda import devices

    assert 1e9 < devices()[0].bandwidth() < 1e12

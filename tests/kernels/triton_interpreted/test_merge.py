"""A whole merge with FASTMERGE_BACKEND=triton, as a user would try it without a GPU."""

from __future__ import annotations

import pytest
import torch
from checkpoints import save
from checks import assert_close, assert_same_bits
from fake_device import FakeDevice

import fastmerge as fm
from fastmerge._dispatch import Batch
from fastmerge.device import use_devices
from fastmerge.ops import weighted_sum


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
        ("breadcrumbs_ties", {"weight": [1.0, 0.5, 0.7], "density": 0.5, "gamma": 0.05, "rescale": True}, True),
        ("dare_ties", {"weight": [1.0, 0.5, 0.7], "density": 0.3}, True),
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


@pytest.mark.parametrize(
    ("method", "parameters", "kernel"),
    [
        ("ties", {"weight": 1.0, "density": 0.4}, "consensus_merge_kernel"),
        ("task_arithmetic", {"weight": 0.3}, "weighted_sum_many_kernel"),
        ("linear", {"weight": [0.3, 0.7]}, "weighted_sum_many_kernel"),
    ],
)
def test_small_tensors_share_launches(method, parameters, kernel, launches, monkeypatch):
    g = torch.Generator().manual_seed(6)
    base = {f"layer.{i}.weight": (torch.randn(3 + i, 5, generator=g) * 0.02).bfloat16() for i in range(9)}
    tuned = [
        {n: (t.float() + torch.randn(t.shape, generator=g) * 0.002).bfloat16() for n, t in base.items()} for _ in "ab"
    ]
    monkeypatch.setenv("FASTMERGE_BACKEND", "cpu")
    want = fm.merge(method, base, tuned, **parameters)
    assert launches == []
    monkeypatch.setenv("FASTMERGE_BACKEND", "triton")
    got = fm.merge(method, base, tuned, **parameters)
    assert launches.count(kernel) == 1, launches
    assert launches.count("settle_kernel") == (1 if method == "ties" else 0)  # the thresholds of all tensors at once
    for name in want:
        assert_same_bits(got[name], want[name], f"{method} {name}")


@pytest.mark.parametrize(
    ("method", "parameters", "kernel"),
    [
        ("ties", {"weight": 1.0, "density": 0.4}, "consensus_merge_kernel"),
        ("task_arithmetic", {"weight": 0.3}, "weighted_sum_many_kernel"),
        ("fr", {}, "weighted_sum_many_kernel"),
    ],
)
def test_small_tensors_of_checkpoints_share_launches(method, parameters, kernel, launches, monkeypatch, tmp_path):
    """Streamed from files through the pipeline of a GPU, here one without hardware."""
    g = torch.Generator().manual_seed(8)
    base = {f"layer.{i}.bias": (torch.randn(30 + i, generator=g) * 0.02).bfloat16() for i in range(9)}
    folders = [save(tmp_path / "base", base)]
    for name in "ab":
        tuned = {n: (t.float() + torch.randn(t.shape, generator=g) * 0.002).bfloat16() for n, t in base.items()}
        folders.append(save(tmp_path / name, tuned))
    monkeypatch.setenv("FASTMERGE_BACKEND", "cpu")
    fm.merge(method, folders[0], folders[1:], out=tmp_path / "cpu", device="cpu", **parameters)
    monkeypatch.setenv("FASTMERGE_BACKEND", "triton")
    count = {}
    for together in (False, True):
        if not together:
            monkeypatch.setattr(Batch, "SMALL", 0)
        launches.clear()
        device = FakeDevice()
        with use_devices([device]):
            fm.merge(method, folders[0], folders[1:], out=tmp_path / str(together), device="cuda", **parameters)
        monkeypatch.setattr(Batch, "SMALL", 1 << 20)
        assert not device.problems
        count[together] = sum(name.startswith(kernel.removesuffix("_many_kernel")) for name in launches)
        for name in sorted(f.name for f in (tmp_path / "cpu").glob("*.safetensors")):
            assert (tmp_path / str(together) / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()
    assert count == {False: 9, True: 1}
    assert kernel in launches


def test_fr_stores_no_delta(launches, monkeypatch):
    base, tuned = models()
    monkeypatch.setenv("FASTMERGE_BACKEND", "triton")
    fm.merge("fr", base, tuned)
    assert "project_kernel" in launches
    assert launches.count("weighted_sum_many_kernel") == 1  # the two vectors
    assert "weighted_sum_kernel" not in launches


def test_many_calls_as_a_list():
    g = torch.Generator().manual_seed(7)
    calls, want = [], []
    for n in (3, 70, 1):
        base, *models = torch.randn(3, n, generator=g).bfloat16().unbind()
        calls.append(((base, models, [0.5, 0.3]), {"scale": 0.7, "add_base": n > 1}))
        want.append(weighted_sum(*calls[-1][0], **calls[-1][1], backend="reference"))
    assert weighted_sum.backends["triton"].many is not None
    for backend in ("triton", "cpu", "reference"):
        for got, expected in zip(
            weighted_sum.each([(a, kw | {"backend": backend}) for a, kw in calls]), want, strict=True
        ):
            assert_same_bits(got, expected, backend)

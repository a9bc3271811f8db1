"""--device: names, the model behind `auto`, and what the plan and the report say."""

import json

import pytest
import torch
from checks import assert_same_bits
from device_cases import CASES, write_case
from fake_device import FakeDevice
from typer.testing import CliRunner

import fastmerge as fm
from fastmerge import cli, methods
from fastmerge.device import choose, cuda, use_devices
from fastmerge.device.choose import STARTUP, Work, parse, seconds
from fastmerge.device.fleet import assign
from fastmerge.engine import run
from fastmerge.errors import BadInput


def work(method="ties", gigabytes=10.0, workers=4):
    return Work(methods.get(method), int(gigabytes * 1e9), int(gigabytes * 1e9 / 5), workers)


@pytest.mark.parametrize(
    ("text", "means"), [("auto", "auto"), ("cpu", "cpu"), ("cuda", 0), ("cuda:0", 0), ("cuda:12", 12), ("cuda:all", "all")]
)  # fmt: skip
def test_names(text, means):
    assert parse(text) == means


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "mps", ""])
def test_other_names_are_refused(tmp_path, text):
    with pytest.raises(BadInput, match=rf"device '{text}' is not one of auto, cpu, cuda, cuda:0 or cuda:all"):
        run("no-recipe-is-read.yml", tmp_path / "out", device=text)


def test_a_gpu_by_name_on_a_machine_without_one():
    with use_devices([]), pytest.raises(BadInput, match="device 'cuda' can not be used: there is none"):
        choose("cuda", work())


def test_this_torch_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(BadInput, match="this torch is a CPU build"):
        choose("cuda:1", work())
    assert choose("auto", work()).name == "cpu"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(BadInput, match="torch finds no GPU, or no driver for it"):
        choose("cuda:1", work())
    assert cuda.devices() == []


def test_an_index_out_of_range_names_what_is_there():
    with (
        use_devices([FakeDevice("cuda:0"), FakeDevice("cuda:1")]),
        pytest.raises(BadInput, match=r"'cuda:2' is not there: this machine has 2 \(cuda:0, cuda:1\)"),
    ):
        choose("cuda:2", work())


def test_methods_of_whole_tensors_stay_on_the_cpu_and_say_why(monkeypatch):
    method = methods.get("linear")
    monkeypatch.setattr(method, "grain", "tensor")
    with use_devices([FakeDevice()]):
        chosen = choose("auto", work("linear", 1e6))
        assert (chosen.name, chosen.why) == ("cpu", "linear takes whole tensors, and only chunks are merged on a GPU")
        with pytest.raises(BadInput, match="linear takes whole tensors"):
            choose("cuda", work("linear"))


# ---- auto


def test_the_model_is_bytes_over_bandwidths():
    m = seconds(work("linear", 100, workers=2), 1, 20e9)
    assert m["copy_s"] == 100e9 / 20e9
    assert m["gpu_s"] == STARTUP + max(100e9 / (2 * 7e9), 5.0)
    assert m["cpu_s"] == 100e9 / (2 * 7e9) + 100e9 / (2 * 5e9)
    assert seconds(work("linear", 100, workers=2), 2, 20e9)["copy_s"] == 2.5


def test_auto_takes_the_gpu_where_the_cpu_is_the_slower_one():
    with use_devices([FakeDevice(bus=25e9), FakeDevice("cuda:1")]):
        chosen = choose("auto", work("fr", 200, workers=8))
    assert chosen.name == "cuda:0"
    assert chosen.why.startswith("auto: cuda:0. Model: 200.00 GB to the GPU and 40.00 GB back at 25 GB/s, 3 s to start")
    assert chosen.model["gpu_s"] < chosen.model["cpu_s"]
    assert chosen.where(methods.get("fr")) == {"fit": "cpu", "scan": "cpu", "merge": "cuda:0"}


@pytest.mark.parametrize(
    ("method", "size", "workers", "bus", "bound"),
    [("linear", 200, 32, 12e9, "the bus"), ("linear", 1, 2, 50e9, "starting CUDA"), ("fr", 500, 64, 4e9, "the bus")],
)
def test_auto_takes_the_cpu_where_the_gpu_is_bound_and_says_by_what(method, size, workers, bus, bound):
    with use_devices([FakeDevice(bus=bus)]):
        chosen = choose("auto", work(method, size, workers))
    assert chosen.name == "cpu"
    assert f"on a GPU the job is bound by {bound}." in chosen.why


def test_a_small_job_does_not_wake_the_device(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(device, "bandwidth", lambda: pytest.fail("measured for nothing"))
    with use_devices([device]):
        assert choose("auto", work("linear", 0.1)).name == "cpu"


def test_auto_without_a_gpu_says_so(tmp_path):
    recipe = write_case(tmp_path, CASES["linear"])
    with use_devices([]):
        report = run(recipe, None, dry_run=True)
    assert report.device == "cpu"
    assert report.estimate["device_why"] == "no GPU: there is none"


# ---- plan, report, Python


def test_the_plan_says_what_runs_where_and_what_it_holds(tmp_path):
    recipe = write_case(tmp_path, CASES["ties, bfloat16"])
    with use_devices([FakeDevice()]):
        said = CliRunner().invoke(
            cli.app, ["merge", str(recipe), str(tmp_path / "out"), "--dry-run", "--device", "cuda", "--max-vram", "1G"]
        )
    assert said.exit_code == 0, said.output
    text = " ".join(said.stdout.split())
    assert "device fit on cpu, scan on cpu, merge on cuda:0" in text
    assert "why asked for by --device cuda" in text
    assert "GPU memory" in text
    assert "pinned host memory" in text


def test_the_plan_of_auto_says_why_it_takes_the_cpu(tmp_path):
    recipe = write_case(tmp_path, CASES["linear"])
    with use_devices([FakeDevice()]):
        said = CliRunner().invoke(cli.app, ["merge", str(recipe), str(tmp_path / "out"), "--dry-run"])
    text = " ".join(said.stdout.split())
    assert "auto: the CPU; on a GPU the job is bound by starting CUDA. Model: 0.00 GB to the GPU" in text


def test_bad_devices_exit_with_2_and_a_remedy(tmp_path):
    recipe = write_case(tmp_path, CASES["linear"])
    with use_devices([FakeDevice()]):
        said = CliRunner().invoke(cli.app, ["merge", str(recipe), str(tmp_path / "out"), "--device", "cuda:7"])
    assert said.exit_code == 2
    assert "this machine has 1 (cuda:0)" in said.stderr
    assert not (tmp_path / "out").exists()


def test_the_report_has_device_model_and_bytes(tmp_path):
    recipe = write_case(tmp_path, CASES["linear"])
    with use_devices([FakeDevice()]):
        run(recipe, tmp_path / "out", device="cuda")
    report = json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())
    assert report["device"] == "cuda:0"
    assert report["where"] == {"merge": "cuda:0"}
    assert report["device_bytes"][0]["down"] == sum(
        t["bytes_written"] for t in report["tensors"] if t["how"] == "merged"
    )
    assert report["estimate"]["device_model"]["bus_bytes_per_s"] == 25e9


@pytest.mark.parametrize("device", ["cuda", "cuda:all"])
@pytest.mark.parametrize("method", ["ties", "fr"])
def test_models_in_memory(method, device):
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.randn(7, 11, generator=g), "b": torch.randn(300, generator=g), "n": torch.tensor(3)}
    models = [
        {k: v + 0.1 * torch.randn(v.shape, generator=g) if k != "n" else v for k, v in base.items()} for _ in "xy"
    ]
    options = {"weight": 0.5, "density": 0.3} if method == "ties" else {}
    want = fm.merge(method, base, models, device="cpu", **options)
    devices = [FakeDevice(f"cuda:{i}", uploads="early") for i in range(2)]
    with use_devices(devices):
        got = fm.merge(method, base, models, device=device, **options)
    assert list(got) == list(want)
    for name in want:
        assert_same_bits(got[name], want[name], name)
    assert [bool(d.log) for d in devices] == [True, device == "cuda:all"]
    assert not any(d.problems for d in devices)


def test_models_on_a_device_stay_there():
    there = {"a": torch.empty(3, device="meta")}
    with pytest.raises(BadInput, match="device 'cpu' is asked for, but tensors are on meta"):
        fm.merge("linear", None, [there, there], weight=0.5, device="cpu")


def test_a_folder_from_python(tmp_path):
    recipe = write_case(tmp_path, CASES["linear"])
    assert recipe.exists()
    folders = [tmp_path / n for n in "bcd"]
    device = FakeDevice()
    with use_devices([device]):
        report = fm.merge("linear", None, folders, weight=0.5, out=tmp_path / "out", device="cuda", max_vram=10**8)
    assert report.device == "cuda:0"
    assert device.log


def test_tensors_are_shared_out_by_size():
    assert assign([5, 1, 4, 2], 2) == [[0, 1], [2, 3]]
    assert assign([3], 3) == [[0], [], []]
    assert assign([], 2) == [[], []]
    shares = assign(list(range(100)), 7)
    assert sorted(i for s in shares for i in s) == list(range(100))
    loads = [sum(s) for s in shares]
    assert max(loads) - min(loads) <= 99

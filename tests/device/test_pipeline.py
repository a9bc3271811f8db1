"""The engine's GPU pipeline on a device that records: order, buffers, bytes, results equal to the CPU's."""

import sys

import pytest
import torch
from checkpoints import load
from checks import assert_same_bits
from device_cases import CASES, write_case
from fake_device import FAULTS, FakeDevice

from fastmerge.device import use_devices
from fastmerge.engine import run
from fastmerge.errors import BadInput
from fastmerge.io.writer import work_folder

budget_module = sys.modules["fastmerge.device.budget"]
stage_module = sys.modules["fastmerge.device.stage"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Tensors of the tiny model take several chunks."""
    monkeypatch.setattr(budget_module, "BLOCK", 16)
    monkeypatch.setattr(budget_module, "CHUNK", 48)


def on(device, recipe, out, **options):
    with use_devices([device] if isinstance(device, FakeDevice) else device):
        return run(recipe, out, device=options.pop("name", "cuda"), **options)


def same_files(one, other):
    files = sorted(f.name for f in one.glob("*.safetensors"))
    assert files == sorted(f.name for f in other.glob("*.safetensors"))
    return all((one / f).read_bytes() == (other / f).read_bytes() for f in files)


@pytest.mark.parametrize(("uploads", "threads"), [("late", 1), ("early", 3)])
@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_those_of_the_cpu(tmp_path, name, uploads, threads):
    recipe = write_case(tmp_path, CASES[name])
    run(recipe, tmp_path / "cpu", device="cpu", threads=2)
    device = FakeDevice(uploads=uploads)
    report = on(device, recipe, tmp_path / "gpu", threads=threads)
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    assert device.problems == []
    assert report.device == report.where["merge"] == "cuda:0"
    assert not report.notes
    merged = sum(t.bytes_written for t in report.tensors if t.how == "merged")
    assert device.copied["down"] == merged > 0
    assert device.copied["up"] == report.device_bytes[0]["up"]
    assert device.most_in_flight > 1  # chunks do overlap
    assert [t.name for t in report.tensors] == [t.name for t in run(recipe, None, dry_run=True).tensors]


@pytest.mark.parametrize("uploads", ["late", "early"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_order_is_caught(tmp_path, fault, uploads):
    recipe = write_case(tmp_path, CASES["task_arithmetic"])
    run(recipe, tmp_path / "cpu", device="cpu")
    device = FakeDevice(uploads=uploads, faults=(fault,))
    on(device, recipe, tmp_path / "gpu", threads=1)
    assert device.problems  # by the order alone
    if uploads == "late":  # and by values, where what was not ordered has not happened
        assert not same_files(tmp_path / "cpu", tmp_path / "gpu")


def test_a_buffer_reused_early_is_caught(tmp_path, monkeypatch):
    """A slot that counts as free once its inputs are copied in."""
    slot = __import__("fastmerge.device.stage", fromlist=["Slot"]).Slot
    right = slot.pending

    def first_event_stays(self, event, store):
        right(self, self._event or event, store)

    monkeypatch.setattr(slot, "pending", first_event_stays)
    recipe = write_case(tmp_path, CASES["task_arithmetic"])
    run(recipe, tmp_path / "cpu", device="cpu")
    device = FakeDevice()
    on(device, recipe, tmp_path / "gpu", threads=1)
    assert not same_files(tmp_path / "cpu", tmp_path / "gpu")
    assert device.problems


def test_work_on_memory_it_did_not_name_is_caught():
    device = FakeDevice()
    stream = device.stream("compute")
    ours, other = device.memory(8), device.memory(8)
    device.run(lambda: torch._foreach_add_([ours.zero_(), other.zero_()], 1), stream, [], [ours])
    device.synchronize(device.record(stream))
    assert device.problems == ["work wrote memory that it did not name"]
    assert ours.tolist() == [1] * 8


@pytest.mark.parametrize("chunk", [16, 32, 1024])
@pytest.mark.parametrize("name", ["ties, bfloat16", "dare_ties", "della", "fr"])
def test_results_do_not_depend_on_device_chunks(tmp_path, monkeypatch, name, chunk):
    recipe = write_case(tmp_path, CASES[name])
    run(recipe, tmp_path / "cpu", device="cpu")
    monkeypatch.setattr(budget_module, "CHUNK", chunk)
    device = FakeDevice()
    on(device, recipe, tmp_path / "gpu", threads=2)
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    assert not device.problems


# ---- small tensors


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["task_arithmetic, mixed dtypes", "dare_ties", "slerp", "passthrough"])
def test_small_tensors_share_slots_and_have_the_same_bytes_as_alone(tmp_path, monkeypatch, name, threads):
    recipe = write_case(tmp_path, CASES[name])
    runs = {}
    for small in (0, 40):  # the norms have 8 elements
        monkeypatch.setattr(stage_module.Batch, "SMALL", small)
        device = FakeDevice()
        report = on(device, recipe, tmp_path / f"{small}", threads=threads)
        assert not device.problems
        runs[small] = sum(o.kind == "run" for o in device.log)
        rows = [t for t in report.tensors if t.how == "merged"]
        assert all(t.bytes_written > 0 for t in rows)
    norms = sum("norm" in t.name for t in rows)
    assert norms == 4
    assert runs[40] == runs[0] - norms + 1
    assert same_files(tmp_path / "0", tmp_path / "40")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["fr", "fr, select"])
def test_small_matrices_are_filtered_in_shared_slots(tmp_path, monkeypatch, name, threads):
    monkeypatch.setattr(budget_module, "CHUNK", 512)
    recipe = write_case(tmp_path, CASES[name])
    run(recipe, tmp_path / "cpu", device="cpu")
    runs = {}
    for small in (0, 512):  # all of them
        monkeypatch.setattr(stage_module.Batch, "SMALL", small)
        device = FakeDevice(uploads="early")
        report = on(device, recipe, tmp_path / f"{small}", threads=threads)
        assert not device.problems
        assert not report.notes
        runs[small] = sum(o.kind == "run" for o in device.log)
        assert device.copied["down"] == sum(t.bytes_written for t in report.tensors if t.how == "merged")
        assert same_files(tmp_path / "cpu", tmp_path / f"{small}")
    assert runs[512] < runs[0] / 3
    least = needed(recipe, tmp_path)
    for i in (1, 3):
        device = FakeDevice()
        report = on(device, recipe, tmp_path / f"least{i}", max_vram=i * least, threads=threads)
        assert device.peak <= i * least
        assert same_files(tmp_path / "cpu", tmp_path / f"least{i}")


def test_a_parcel_is_sent_when_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(budget_module, "CHUNK", 16)  # two norms
    recipe = write_case(tmp_path, CASES["task_arithmetic"])
    run(recipe, tmp_path / "cpu", device="cpu")
    device = FakeDevice(uploads="early")
    on(device, recipe, tmp_path / "gpu")
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    assert not device.problems
    large = -(-37 * 8 // 16) + 3 * (64 // 16 + -(-104 // 16))  # chunks
    assert sum(o.kind == "run" for o in device.log) == large + 2


def test_flushing_makes_no_slots():
    budget = budget_module.make_budget(
        "cuda:0", inputs=2, per_element=8, out=4, compute=4, largest=1000, workers=4, max_vram=None, free=1 << 30
    )
    assert budget.slots == 6
    stage = stage_module.Stage(FakeDevice(), budget)
    with stage.slot():
        pass
    stage.flush()
    assert len(stage._every) == 1


def test_nan_in_a_small_tensor_publishes_nothing_and_resumes(tmp_path):
    from safetensors.torch import load_file, save_file

    recipe = write_case(tmp_path, CASES["task_arithmetic"], shards=1)
    file = tmp_path / "b" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.input_layernorm.weight"][2] = float("nan")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(BadInput, match=r"'model\.layers\.1\.input_layernorm\.weight' has NaN .*flat index 2"):
        on(FakeDevice(), recipe, tmp_path / "gpu")
    assert not (tmp_path / "gpu").exists()
    report = on(FakeDevice(), recipe, tmp_path / "gpu", resume=True, nan="warn")
    assert "merged" in {t.how for t in report.tensors}  # what was in the parcel was not stored
    run(recipe, tmp_path / "cpu", nan="allow", device="cpu")
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")


# ---- memory


def needed(recipe, tmp_path):
    with pytest.raises(BadInput, match=r"--max-vram 1 is too small: cuda:0 needs (\d+) bytes") as caught:
        on(FakeDevice(), recipe, tmp_path / "out", max_vram=1)
    assert not work_folder(tmp_path / "out").exists()
    return int(str(caught.value).split("needs ")[1].split()[0])


@pytest.mark.parametrize("name", ["linear", "ties, bfloat16", "fr"])
def test_max_vram_bounds_the_bytes_and_the_error_names_what_is_enough(tmp_path, name):
    recipe = write_case(tmp_path, CASES[name])
    least = needed(recipe, tmp_path)
    with pytest.raises(BadInput, match=f"needs {least} bytes"):
        on(FakeDevice(), recipe, tmp_path / "out", max_vram=least - 1)
    run(recipe, tmp_path / "cpu", device="cpu")
    for i, limit in enumerate([least, 3 * least, 100_000]):
        device = FakeDevice()
        report = on(device, recipe, tmp_path / f"gpu{i}", max_vram=limit, threads=2)
        assert device.peak <= limit
        assert report.estimate["vram_bytes"][0] <= limit
        assert same_files(tmp_path / "cpu", tmp_path / f"gpu{i}")
        assert not device.problems


def test_without_max_vram_a_share_of_the_free_memory_is_used(tmp_path):
    recipe = write_case(tmp_path, CASES["linear"])
    with pytest.raises(BadInput, match=r"cuda:0 has 1000 bytes free, of which 800, is too small: cuda:0 needs \d+"):
        on(FakeDevice(free=1000), recipe, tmp_path / "out")
    device = FakeDevice(free=20_000)
    on(device, recipe, tmp_path / "out")
    assert device.peak <= 16_000


def test_pinned_memory_counts_against_max_memory(tmp_path):
    recipe = write_case(tmp_path, CASES["linear"])
    held = 5 * 4 * run(recipe, None, dry_run=True, threads=1).chunk_elements
    with pytest.raises(BadInput, match=r"--max-memory leaves 500 bytes for pinned buffers, cuda:0 needs \d+"):
        on(FakeDevice(), recipe, tmp_path / "out", max_memory=held + 500, threads=1)
    report = on(FakeDevice(), recipe, tmp_path / "out", max_memory=held + 6000, threads=1)
    assert report.estimate["pinned_bytes"][0] <= 6000


def test_a_tensor_too_large_to_transform_on_the_device_is_merged_on_the_cpu_and_named(tmp_path):
    recipe = write_case(tmp_path, CASES["fr"])
    run(recipe, tmp_path / "cpu", device="cpu")
    device = FakeDevice()
    report = on(device, recipe, tmp_path / "gpu", max_vram=needed(recipe, tmp_path) + 1100)
    assert [n for n in report.notes if n.startswith("model.embed_tokens.weight was merged on the CPU: it would take")]
    assert len(report.notes) < len(report.tensors)
    assert device.copied["down"] > 0
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    assert not device.problems


def test_rows_longer_than_a_chunk_are_ranked_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(budget_module, "BLOCK", 4)
    monkeypatch.setattr(budget_module, "CHUNK", 4)
    recipe = write_case(tmp_path, CASES["della"])
    run(recipe, tmp_path / "cpu", device="cpu")
    report = on(FakeDevice(), recipe, tmp_path / "gpu")
    assert all("was merged on the CPU" in n for n in report.notes)
    assert len(report.notes) == sum(t.how == "merged" for t in report.tensors)
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")


# ---- several devices


def test_several_devices_share_out_the_tensors(tmp_path):
    recipe = write_case(tmp_path, CASES["ties, bfloat16"])
    run(recipe, tmp_path / "cpu", device="cpu")
    devices = [FakeDevice(f"cuda:{i}") for i in range(3)]
    report = on(devices, recipe, tmp_path / "gpu", name="cuda:all", threads=3)
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")
    assert report.device == "cuda:0, cuda:1, cuda:2"
    down = [d.copied["down"] for d in devices]
    assert sum(down) == sum(t.bytes_written for t in report.tensors if t.how == "merged")
    assert min(down) > 0
    assert not any(d.problems for d in devices)


def test_one_device_of_several(tmp_path):
    recipe = write_case(tmp_path, CASES["linear"])
    devices = [FakeDevice("cuda:0"), FakeDevice("cuda:1")]
    assert on(devices, recipe, tmp_path / "gpu", name="cuda:1").device == "cuda:1"
    assert (devices[0].log, bool(devices[1].log)) == ([], True)


# ---- what goes wrong on the way


@pytest.mark.parametrize("name", ["cuda", "cuda:all"])
def test_nan_found_on_the_way_publishes_nothing_and_resumes(tmp_path, name):
    from safetensors.torch import load_file, save_file

    recipe = write_case(tmp_path, CASES["task_arithmetic"], shards=1)
    file = tmp_path / "b" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(state, file, {"format": "pt"})
    devices = [FakeDevice(f"cuda:{i}") for i in range(2)]
    with pytest.raises(BadInput, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has NaN .*flat index 19"):
        on(devices, recipe, tmp_path / "gpu", name=name)
    assert not (tmp_path / "gpu").exists()
    assert work_folder(tmp_path / "gpu").exists()
    report = on([FakeDevice(), FakeDevice("cuda:1")], recipe, tmp_path / "gpu", name=name, resume=True, nan="warn")
    assert "resumed" in {t.how for t in report.tensors}
    assert list(report.nonfinite.values()) == [1]
    run(recipe, tmp_path / "cpu", nan="allow", device="cpu")
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")


def test_a_failing_device_is_an_error_and_leaves_a_resumable_job(tmp_path, monkeypatch):
    recipe = write_case(tmp_path, CASES["linear"])
    device = FakeDevice()
    calls = []

    def failing(event):
        calls.append(event)
        if len(calls) > 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(device, "synchronize", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        on(device, recipe, tmp_path / "gpu", threads=2)
    assert not (tmp_path / "gpu").exists()
    on(FakeDevice(), recipe, tmp_path / "gpu", force=True)
    run(recipe, tmp_path / "cpu", device="cpu")
    assert same_files(tmp_path / "cpu", tmp_path / "gpu")


def test_empty_and_scalar_tensors(tmp_path):
    from checkpoints import save

    state = {"a.empty": torch.zeros(0, 4), "b.scalar": torch.tensor(2.0), "c": torch.arange(5.0)}
    folders = [save(tmp_path / n, {k: v + i for k, v in state.items()}) for i, n in enumerate("xy")]
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- model: {folders[0]}\n  parameters: {{weight: 1}}\n"
        f"- model: {folders[1]}\n  parameters: {{weight: 1}}\n"
    )
    on(FakeDevice(), recipe, tmp_path / "gpu")
    got = load(tmp_path / "gpu")
    for name, value in state.items():
        assert_same_bits(got[name], value + 0.5 if name != "a.empty" else value, name)

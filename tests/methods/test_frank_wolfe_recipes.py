"""Frank-Wolfe from the command line: image classifiers with their heads, and every option of ``merge`` kept or refused."""

import json

import pytest
import torch
from hugging_face import import_transformers, lines
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastmerge import fw
from fastmerge.calibration import check_records
from fastmerge.cli import app
from fastmerge.engine import run
from fastmerge.errors import BadInput
from fastmerge.io.checkpoint import open_checkpoint
from fastmerge.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny ViT; `tuned` knows red from blue, `shade` (with a head of three classes) dark from light, `noise` nothing."""
    from PIL import Image

    import_transformers()
    from transformers import ViTConfig, ViTForImageClassification

    root = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)

    def model(labels):
        config = ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16,
            patch_size=8, num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return ViTForImageClassification(config)

    base = model(2)
    base.save_pretrained(root / "base")
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 16, "width": 16},
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True,
        "rescale_factor": 1 / 255,
    }  # fmt: skip
    (root / "base" / "preprocessor_config.json").write_text(json.dumps(processor))
    records = []
    for i in range(12):
        level = 90 + 40 * (i // 4)
        Image.new("RGB", (20, 24), (level, 0, 0) if i % 2 else (0, 0, level)).save(root / f"{i}.png")
        records.append({"image": f"{i}.png", "label": i % 2, "task": "colour"})
    lines(root / "colour.jsonl", records)
    shades = [{**r, "label": i // 4, "task": "shade"} for i, r in enumerate(records)]
    lines(root / "both.jsonl", [r for pair in zip(records, shades, strict=True) for r in pair])
    start = {n: t.clone() for n, t in base.state_dict().items()}

    def tune(folder, labels, wanted):
        from fastmerge.calibration import image_batches

        tuned = model(labels)
        tuned.load_state_dict({n: t for n, t in start.items() if "classifier" not in n}, strict=False)
        if labels == 2:
            tuned.load_state_dict(start)

        class Scale:
            def __call__(self, images, return_tensors):
                import numpy as np

                small = [np.asarray(i.resize((16, 16)), dtype=np.float32).transpose(2, 0, 1) for i in images]
                return {"pixel_values": torch.from_numpy(np.stack(small)) / 127.5 - 1}

        (batch,) = image_batches(wanted, Scale(), batch=64, folder=root)
        adam = torch.optim.Adam(tuned.parameters(), lr=5e-3)
        for _ in range(40):
            adam.zero_grad()
            tuned(**batch).loss.backward()
            adam.step()
        tuned.save_pretrained(folder)

    tune(root / "tuned", 2, records)
    tune(root / "shade", 3, shades)
    with torch.no_grad():
        for p in base.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    base.save_pretrained(root / "noise")
    return root


def cli(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_images_calibrate_an_image_classifier(root, tmp_path):
    out = tmp_path / "out"
    said = cli(
        "fw", root / "base", root / "noise", root / "tuned", "--out", out, "--data", root / "colour.jsonl", "--kind",
        "image", "--init", "base", "--step", "line_search", "--iterations", 6, "--batch", 5, "--json", "--quiet",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    losses = [i["loss"] for i in json.loads(said.stdout)["iterations"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.85 * losses[0]
    assert (out / "preprocessor_config.json").is_file()
    from transformers import AutoModelForImageClassification

    assert AutoModelForImageClassification.from_pretrained(out).config.num_labels == 2


def test_every_task_is_judged_by_its_own_head(root, tmp_path):
    out = tmp_path / "out"
    words = [
        "fw", root / "base", root / "shade", root / "tuned", "--out", out, "--data", root / "both.jsonl", "--kind",
        "image", "--init", "base", "--step", "line_search", "--iterations", 3, "--json", "--quiet",
    ]  # fmt: skip
    heads = ["--head", f"colour={root / 'tuned'}", "--head", f"shade={root / 'shade'}"]
    # Heads of two sizes: the classifier can not be merged, and must be left out.
    said = cli(*words, *heads)
    assert said.exit_code == 2
    assert "exclude" in said.output
    said = cli(*words, *heads, "--exclude", "classifier")
    assert said.exit_code == 0, said.output
    trace = json.loads(said.stdout)
    losses = [i["loss"] for i in trace["iterations"]]
    assert losses[-1] < losses[0]
    assert {k for i in trace["iterations"] for k in i["choices"] if k is not None} == {0, 1}
    merged, base = load_file(out / "model.safetensors"), load_file(root / "base" / "model.safetensors")
    assert torch.equal(merged["classifier.weight"], base["classifier.weight"])
    said = cli(*words, *heads[:2], "--exclude", "classifier", "--force")
    assert said.exit_code == 2
    assert "no head is given for task 'shade'" in said.output


def test_images_that_can_not_be_read_are_named(root, tmp_path):
    data = lines(tmp_path / "x.jsonl", [{"image": "none.png", "label": 0}])
    said = cli("fw", root / "base", root / "tuned", "-o", tmp_path / "o", "--data", data, "--kind", "image")
    assert said.exit_code == 2
    assert "none.png" in said.output
    assert not (tmp_path / "o").exists()


def recipe(root, *models, method="frank_wolfe", **parameters):
    settings = {"data": str(root / "colour.jsonl"), "kind": "image", "init": "base", "iterations": 1, **parameters}
    return Recipe.parse(
        json.dumps(
            {
                "merge_method": method,
                "base_model": str(root / "base"),
                "models": [{"model": str(m)} for m in models],
                "parameters": settings,
            }
        )
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resume": True}, "can not resume"),
        ({"nan": "warn"}, "can not go on with NaN"),
        ({"nan": "maybe"}, "nan must be one of"),
        ({"max_memory": 1 << 30}, "--max-memory bounds buffers"),
        ({"max_vram": 1 << 30}, "--max-vram bounds buffers"),
        ({"device": "cuda:all"}, "one device"),
        ({"device": "tpu"}, "'tpu' is not one of"),
    ],
)
def test_options_without_a_meaning_are_refused(root, tmp_path, options, match):
    with pytest.raises(BadInput, match=match):
        run(recipe(root, root / "tuned"), tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


def test_options_are_kept(root, tmp_path):
    told = []
    settings = recipe(root, root / "noise", root / "tuned", step="line_search", heads=[f"colour={root / 'tuned'}"])
    settings.out_dtype = "bfloat16"
    before = torch.get_num_threads()
    report = run(
        settings, tmp_path / "o", threads=1, max_shard_bytes=5_000, device="cpu",
        progress=lambda done, total, phase: told.append((done, total)),
    )  # fmt: skip
    assert report.workers == 1
    assert torch.get_num_threads() == before
    assert told == [(report.bytes_read, report.bytes_read)]
    assert len(list((tmp_path / "o").glob("model-*.safetensors"))) > 1
    saved = open_checkpoint(tmp_path / "o")
    assert {saved.dtype(n) for n in saved.names()} == {torch.bfloat16}
    assert json.loads((tmp_path / "o" / "config.json").read_text())["dtype"] == "bfloat16"
    card = (tmp_path / "o" / "README.md").read_text()
    assert "mergekit" in card
    assert "share of the steps" in card
    assert json.loads((tmp_path / "o" / "fastmerge_report.json").read_text())["method"] == "frank_wolfe"
    assert fw.Trace.load(tmp_path / "o" / "frank_wolfe_trace.json").settings["step"] == "line_search"


def test_a_dry_run_tells_what_is_resident_and_writes_nothing(root, tmp_path):
    report = run(recipe(root, root / "noise", step="line_search"), None, dry_run=True)
    elements = sum(t.numel() for t in load_file(root / "base" / "model.safetensors").values())
    assert report.planned
    assert report.estimate["buffer_bytes"] == 3 * 4 * elements  # θ, gradient, trial point
    assert {t.how for t in report.tensors} == {"merged"}
    soft = run(recipe(root, root / "noise", method="frank_wolfe_soft", top_k=2), None, dry_run=True)
    assert soft.estimate["buffer_bytes"] == 5 * 4 * elements


def extra(tmp_path, root):
    state = load_file(root / "tuned" / "model.safetensors")
    (tmp_path / "extra").mkdir()
    save_file({**state, "more.weight": torch.zeros(2)}, tmp_path / "extra" / "model.safetensors")
    return tmp_path / "extra"


def damaged(tmp_path, root):
    state = load_file(root / "tuned" / "model.safetensors")
    state["classifier.weight"][0, 0] = float("nan")
    (tmp_path / "nan").mkdir()
    save_file(state, tmp_path / "nan" / "model.safetensors")
    return tmp_path / "nan"


def test_a_candidate_with_a_broken_configuration_is_refused_before_anything_is_written(root, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").symlink_to(root / "tuned" / "model.safetensors")
    (broken / "config.json").write_text("{")
    for dry in (True, False):
        with pytest.raises(BadInput, match=r"config\.json is not valid JSON") as caught:
            run(recipe(root, root / "tuned", broken), tmp_path / "o", dry_run=dry)
        assert caught.value.where == str(broken / "config.json")
        assert caught.value.remedy is not None
    assert not (tmp_path / "o").exists()


def test_extra_tensors_are_an_error_unless_left_out(root, tmp_path):
    model = extra(tmp_path, root)
    with pytest.raises(BadInput, match=r"1 tensors are not in .*'more.weight'"):
        run(recipe(root, model), None, dry_run=True)
    assert run(recipe(root, model), None, dry_run=True, ignore_extra=True).planned


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": "none.jsonl"}, "none.jsonl"),
        ({"loss": "entropi"}, "did you mean 'entropy'"),
        ({"preset": "publishd"}, "did you mean 'published'"),
        ({"inner": "linear"}, "can not be the inner merge"),
        ({"inner": "tias"}, "did you mean 'ties'"),
        ({"init": "nowhere"}, "nowhere"),
        ({"select": ["("]}, "not a regular expression"),
        ({"heads": ["colour"]}, "not TASK=FOLDER"),
        ({"heads": ["colour=nowhere"]}, "no config.json"),
        ({"heads": ["shade=x"]}, "no head is given for task 'colour'"),
    ],
)
def test_errors_are_found_before_anything_is_computed_or_written(root, tmp_path, change, match):
    for dry in (True, False):
        with pytest.raises(BadInput, match=match):
            run(recipe(root, root / "tuned", **change), tmp_path / "o", dry_run=dry)
    assert not list(tmp_path.iterdir())


def test_candidates_and_output_are_checked_before_anything_is_written(root, tmp_path):
    with pytest.raises(BadInput, match=r"classifier.weight.*has shape"):
        run(recipe(root, root / "shade"), None, dry_run=True)
    with pytest.raises(BadInput, match="no folder or file"):
        run(recipe(root, root / "none"), None, dry_run=True)
    with pytest.raises(BadInput, match="one of the inputs"):
        run(recipe(root, root / "tuned"), root / "tuned", force=True)
    with pytest.raises(BadInput, match=r"classifier.weight' holds NaN"):
        run(recipe(root, damaged(tmp_path, root)), tmp_path / "o")
    assert not (tmp_path / "o").exists()
    soft = recipe(root, root / "tuned", method="frank_wolfe_soft", preset="robust", init="merge", scale=0.4)
    assert run(soft, None, dry_run=True).planned


def test_merged_tensors_that_no_gradient_saw_are_still_checked(root):
    base = {"a": torch.zeros(3), "b": torch.zeros(3)}
    bad = {"a": torch.ones(3), "b": torch.tensor([0.0, float("nan"), 0.0])}
    with pytest.raises(BadInput, match=r"the merged tensor 'b' is not finite"):
        fw.frank_wolfe(base, [bad], lambda state: {"a": torch.ones(3)}, iterations=1)


def test_records_are_checked_without_a_model(root):
    assert list(check_records(root / "both.jsonl", "image")) == ["colour", "shade"]


def test_losses_are_summed_where_the_recipe_says_so(root, tmp_path):
    losses = {}
    for how in ("mean", "sum"):
        settings = recipe(root, root / "noise", root / "tuned", iterations=1, reduction=how, train_mode=True)
        run(settings, tmp_path / how, device="cpu")
        losses[how] = fw.Trace.load(tmp_path / how / "frank_wolfe_trace.json").iterations[0].loss
    assert losses["sum"] == pytest.approx(12 * losses["mean"], rel=1e-4)  # twelve records, no dropout in this model

"""Calibration files, and the fw command from records to a checkpoint folder."""

import json
import shutil

import pytest
import torch
from hugging_face import import_transformers, lines
from typer.testing import CliRunner

from fastmerge import fw
from fastmerge.calibration import by_task, lm_batches, read_records, text_batches
from fastmerge.cli import app
from fastmerge.errors import BadInput
from fastmerge.io.checkpoint import open_checkpoint

# Named third-party warnings only: transformers touches deprecated names while it loads.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers", "ignore::FutureWarning:transformers")
WORDS = ["the", "a", "film", "was", "good", "bad", "dull", "fine", "great", "poor", "plot", "music"]


def test_records_are_read_from_json_lines_and_parquet(tmp_path):
    from pyarrow import Table, parquet

    records = [{"text": "good", "label": 1, "task": "b"}, {"text": "bad", "label": 0, "task": "a"}]
    parquet.write_table(Table.from_pylist(records), tmp_path / "x.parquet")
    assert read_records(tmp_path / "x.parquet", "text") == records
    assert read_records(lines(tmp_path / "x.jsonl", records), "text") == records
    assert read_records(tmp_path / "x.jsonl", "text", limit=1) == records[:1]
    assert list(by_task(records)) == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "content", "kind", "match"),
    [
        ("x.csv", "", "text", "not a known kind of data"),
        ("x.jsonl", "", "text", "no records"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{', "text", r"not valid JSON"),
        ("x.jsonl", "[1]\n", "text", "not a JSON object"),
        ("x.jsonl", '{"label": 1}', "text", "lacks 'text'"),
        ("x.jsonl", '{"text": "a"}', "text", "lacks a numeric 'label'"),
        ("x.jsonl", '{"prompt": "a"}', "lm", "lacks 'response'"),
        ("x.jsonl", '{"text": "a"}', "image", "lacks 'image'"),
        ("x.jsonl", '{"text": "a"}', "sound", "unknown kind 'sound'"),
        ("x.parquet", "no", "text", "not a readable parquet"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, kind, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=match):
        read_records(tmp_path / name, kind)


class Letters:
    """A tokenizer of single letters."""

    pad_token_id, eos_token_id = None, 9

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [ord(c) - 95 for c in text]}


def test_only_responses_count_in_language_model_batches():
    records = [{"prompt": "ab", "response": "c"}, {"text": "ddddd"}]
    (batch,) = lm_batches(records, Letters(), batch=4, max_length=5)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 9], [1, 5, 5, 5, 5]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, 9], [1, 5, 5, 5, 5]]
    assert len(lm_batches(records, Letters(), batch=1, max_length=5)) == 2
    short, _ = lm_batches(records, Letters(), batch=1, max_length=3)
    assert short["labels"].tolist() == [[-100, -100, -100]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny Bert classifier with its tokenizer, and two candidates: one shifted at random, one trained on the data."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast = import_transformers()
    root = tmp_path_factory.mktemp("bert")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    model.save_pretrained(root / "base")
    fast.save_pretrained(root / "base")
    good, bad = {"good", "fine", "great"}, {"bad", "dull", "poor"}
    records = [{"text": f"the film was {w}", "label": int(w in good)} for w in sorted(good | bad)] * 2
    data = lines(root / "calib.jsonl", records)
    start = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    model.save_pretrained(root / "noise")
    model.load_state_dict(start)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    (batch,) = text_batches(records, fast, batch=64, max_length=16)
    for _ in range(60):
        adam.zero_grad()
        model(**batch).loss.backward()
        adam.step()
    model.save_pretrained(root / "tuned")
    return root, data


def test_the_command_merges_transformers_checkpoints(folders, tmp_path):
    root, data = folders
    out = tmp_path / "merged"
    call = [
        "fw", str(root / "base"), str(root / "noise"), str(root / "tuned"), "--out", str(out), "--data", str(data),
        "--text", "--init", "base", "--step", "line_search", "--iterations", "3", "--json", "--plot",
        str(tmp_path / "t.png"),
    ]  # fmt: skip
    said = CliRunner().invoke(app, call)
    assert said.exit_code == 0, said.output
    trace = json.loads(said.stdout)
    losses = [i["loss"] for i in trace["iterations"]]
    assert losses[-1] < 0.7 * losses[0]
    moved = [k for i in trace["iterations"] for k in i["choices"] if k is not None]
    assert moved.count(1) > moved.count(0)  # towards the trained candidate
    saved, template = open_checkpoint(out), open_checkpoint(root / "base")
    assert sorted(saved.names()) == sorted(template.names())
    assert fw.Trace.load(out / "frank_wolfe_trace.json").candidates[1].endswith("tuned")
    assert (out / "tokenizer.json").is_file()
    assert "FW-Merging" in (out / "README.md").read_text()
    assert (tmp_path / "t.png").stat().st_size > 1000

    from transformers import AutoModelForSequenceClassification

    assert AutoModelForSequenceClassification.from_pretrained(out).config.num_labels == 2
    again = CliRunner().invoke(app, call)
    assert again.exit_code == 2
    assert "not empty" in again.output


def test_soft_on_unlabelled_data_with_heads(folders, tmp_path):
    root, _ = folders
    data = lines(tmp_path / "plain.jsonl", [{"text": f"a {w} plot", "task": "films"} for w in WORDS])
    said = CliRunner().invoke(
        app,
        [
            "fw", str(root / "base"), str(root / "noise"), str(root / "tuned"), "--out", str(tmp_path / "out"), "--soft",
            "--data", str(data), "--loss", "entropy", "--head", f"films={root / 'tuned'}", "--exclude", "classifier",
            "--iterations", "1", "--constraint", "capped", "--inner-steps", "3", "--top-k", "2", "--quiet",
        ],
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    trace = fw.Trace.load(tmp_path / "out" / "frank_wolfe_trace.json")
    assert not any("classifier" in n for n in trace.layers)
    assert len(trace.iterations[0].inner_losses) >= 1


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ([], "either --data"),
        (["--gradient", "nowhere"], "not MODULE:FUNCTION"),
        (["--gradient", "no_such_module:f"], "can not be imported"),
        (["--data", "x.jsonl", "--top-k", "2"], "option of soft"),
        (["--data", "x.jsonl", "--head", "films"], "not TASK=FOLDER"),
        (["--data", "x.jsonl", "--text", "--kind", "image"], "one kind, not image and text"),
        (["--gradient", "m:f", "--train-mode"], "--train-mode is for --data"),
        (["--gradient", "m:f", "--loss", "mse"], "--loss is for --data"),
    ],
)
def test_bad_calls_end_with_code_2(folders, tmp_path, extra, match):
    root, _ = folders
    said = CliRunner().invoke(app, ["fw", str(root / "base"), str(root / "noise"), "-o", str(tmp_path / "o"), *extra])
    assert said.exit_code == 2
    assert match in said.output
    assert not (tmp_path / "o").exists()


def test_gradients_of_the_users_own(folders, tmp_path):
    root, _ = folders
    file = tmp_path / "mine.py"
    file.write_text(
        "def make():\n    return lambda state: {n: -t for n, t in state.items() if t.is_floating_point()}\n"
    )
    said = CliRunner().invoke(
        app, ["fw", str(root / "base"), str(root / "noise"), "-o", str(tmp_path / "o"), "--gradient", f"{file}:make"]
    )
    assert said.exit_code == 0, said.output
    assert "step 10/10" in said.output


def test_recipes_name_their_data(folders, tmp_path):
    root, data = folders
    recipe = {
        "merge_method": "frank_wolfe",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / "noise")}, {"model": str(root / "tuned")}],
        "parameters": {"data": str(data), "step": "line_search", "init": "base", "iterations": 1},
    }
    file = tmp_path / "fw.yml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    said = CliRunner().invoke(app, ["merge", str(file), str(tmp_path / "out"), "--json"])
    assert said.exit_code == 0, said.output
    assert fw.Trace.load(tmp_path / "out" / "frank_wolfe_trace.json").settings["step"] == "line_search"
    for change, match in (({"stp": 1}, "stp"), ({"data": None}, "data")):
        file.write_text(json.dumps({**recipe, "parameters": {**recipe["parameters"], **change}}))
        bad = CliRunner().invoke(app, ["merge", str(file), str(tmp_path / "other")])
        assert bad.exit_code == 2, bad.output
        assert match in bad.output
    assert not (tmp_path / "other").exists()


def test_the_command_names_candidates_that_are_equal(folders, tmp_path):
    root, data = folders
    shutil.copytree(root / "tuned", tmp_path / "same")
    call = ["fw", str(root / "base"), str(root / "tuned"), str(tmp_path / "same"), "--data", str(data)]
    losses = []
    for name, more in (("mean", []), ("sum", ["--reduction", "sum", "--train-mode"])):
        said = CliRunner().invoke(app, [*call, "-o", str(tmp_path / name), "--iterations", "1", *more])
        assert said.exit_code == 0, said.output
        assert "same' hold the same weights" in said.output
        trace = fw.Trace.load(tmp_path / name / "frank_wolfe_trace.json")
        assert trace.duplicates == [(0, 1)]
        losses.append(trace.iterations[0].loss)
    assert losses[1] > 6 * losses[0]  # twelve records, with dropout's noise

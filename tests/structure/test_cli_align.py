"""fastmerge align / apply, the recipe method, and the plots."""

import json

import pytest
import torch
import typer
import zoo
from typer.testing import CliRunner

import fastmerge as fm
from fastmerge.cli_align import register
from fastmerge.errors import BadInput
from fastmerge.structure import align, named_spec
from fastmerge.structure.naming import heads_in_config
from fastmerge.structure.plotting import loss_between, plot, similarity_blocks


def pair(name="vit"):
    model, (_, _, architecture, options) = zoo.build(name), zoo.ZOO[name]
    spec = named_spec(architecture, model, **options)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, spec.permute_state(state, spec.random(torch.Generator().manual_seed(7))), spec


@pytest.fixture
def app():
    made = typer.Typer(pretty_exceptions_enable=False)
    register(made)
    return made


def test_align_then_apply_a_checkpoint(tmp_path, app):
    from safetensors.torch import load_file, save_file

    state, other, _ = pair()
    for name, s in (("a", state), ("b", other)):
        (tmp_path / name).mkdir()
        save_file({k: v.contiguous() for k, v in s.items()}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    a, b, perms, out = (str(tmp_path / n) for n in ("a", "b", "perms.npz", "out"))
    shown = CliRunner().invoke(app, ["align", a, b, "-o", perms, "--plot", str(tmp_path / "p.png"), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)["objective"] == pytest.approx(1.0, abs=1e-4)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    shown = CliRunner().invoke(app, ["apply", b, perms, out])
    assert shown.exit_code == 0, shown.output
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[n], t) for n, t in state.items())
    assert (tmp_path / "out" / "config.json").exists()
    assert CliRunner().invoke(app, ["apply", b, perms, out + "2", "--index", "5"]).exit_code == 2
    # The recipe method reads the heads where the command does.
    for name, t in fm.merge("mudsc", None, [a, b]).items():
        torch.testing.assert_close(t, state[name], atol=1e-6, rtol=1e-6)


def test_heads_are_read_from_every_kind_of_config():
    assert heads_in_config({"num_attention_heads": 8, "num_key_value_heads": 2}) == {"heads": 8, "kv_heads": 2}
    assert heads_in_config({"n_head": 12}) == {"heads": 12}
    assert heads_in_config(
        {"vision_config": {"num_attention_heads": 6}, "text_config": {"num_attention_heads": 9}}
    ) == {"heads": 6}
    assert heads_in_config({"num_heads": [3, 6], "heads": None, "n_head": "8"}) == {}


def test_recipe_method_averages_in_the_first_models_frame():
    state, other, _ = pair()
    merged = fm.merge("mudsc", None, [state, other], heads=3)
    for n, t in merged.items():
        torch.testing.assert_close(t, state[n], atol=1e-6, rtol=1e-6)
    with pytest.raises(BadInput, match="needs heads"):
        fm.merge("mudsc", None, [state, other])


def test_plots(tmp_path):
    state, other, spec = pair("mlp")
    found = align([state, other], spec)
    blocks = similarity_blocks([state, other], found)
    assert all(b.diagonal().min() > 0.999 for b in blocks.values())

    def loss(s):
        return float(s["layers.0.weight"].sub(state["layers.0.weight"]).square().sum())

    ts, raw, aligned = loss_between([state, other], found, loss, points=3)
    assert ts == [0.0, 0.5, 1.0]
    assert raw[2] > 1.0
    assert max(aligned) < 1e-9
    assert plot(found, tmp_path / "x.png", states=[state, other], loss=loss).stat().st_size > 1000


LOSS = """
def make():
    return lambda state: float(state["layers.0.weight"].square().sum())
"""


def test_align_draws_the_loss_between_the_networks(tmp_path, app):
    from safetensors.torch import save_file

    state, other, _ = pair("mlp")
    for name, s in (("a", state), ("b", other)):
        (tmp_path / name).mkdir()
        save_file({k: v.contiguous() for k, v in s.items()}, tmp_path / name / "model.safetensors")
    (tmp_path / "mine.py").write_text(LOSS)
    a, b, perms, out = (str(tmp_path / n) for n in ("a", "b", "perms.npz", "p.png"))
    plain = CliRunner().invoke(app, ["align", a, b, "-o", perms, "--plot", out])
    assert plain.exit_code == 0, plain.output
    panels = (tmp_path / "p.png").stat().st_size
    with_loss = ["align", a, b, "-o", perms, "--plot", out, "--loss", f"{tmp_path / 'mine.py'}:make"]
    shown = CliRunner().invoke(app, with_loss)
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "p.png").stat().st_size > panels  # one panel more
    assert CliRunner().invoke(app, ["align", a, b, "-o", perms, "--loss", "x:y"]).exit_code == 2
    assert CliRunner().invoke(app, [*with_loss[:-1], "nowhere:make"]).exit_code == 2
    assert CliRunner().invoke(app, [*with_loss, "--data", "records.jsonl"]).exit_code == 2

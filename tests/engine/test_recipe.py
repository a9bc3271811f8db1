"""Recipes: mergekit's schema as it is, precise errors, and what every tensor resolves to."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge import BadInput, Recipe
from fastmerge._recipe_settings import Gradient
from fastmerge.methods import Deltas, Density, PerModel, Weight, method
from fastmerge.methods._method import Delta, registered

LLAMA = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{s}.weight" for i in range(5) for s in ("self_attn.q_proj", "mlp.down_proj")),
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture(autouse=True, scope="module")
def probe() -> Iterator[None]:
    """A method with a parameter of every kind."""

    @method(models=(1, 3))
    def probe(
        base: Weight,
        deltas: Deltas,
        *,
        weight: PerModel[float],
        density: PerModel[Density] = 1.0,
        lambda_: float = 1.0,
        normalize: bool = True,
        steps: int = 3,
        scope: Literal["tensor", "model"] = "tensor",
        select: list[str] | None = None,
    ) -> Delta:
        """For tests."""
        raise AssertionError("never run")

    @method(base="ignored", models=(2, 2))
    def probe_pair(base: Weight | None, models: Weight, *, t: float) -> Weight:
        """For tests."""
        raise AssertionError("never run")

    yield
    del registered()["probe"], registered()["probe_pair"]


def parse(text: str) -> Recipe:
    return Recipe.parse(text, source="r.yml")


def plans(text: str, names: list[str] = LLAMA) -> dict[str, dict]:
    return {p.name: p.parameters for p in parse(text).resolve(names)}


HEAD = "merge_method: probe\nbase_model: b\nmodels:\n- model: a\n  parameters: {weight: 1}\n"


# ---- what is accepted


def test_a_recipe_as_mergekit_users_write_it():
    recipe = parse("""
models:
  - model: base/model
    # no parameters necessary for base model
  - model: org/one@main
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/two
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: probe
base_model: base/model
parameters:
  normalize: on
  int8_mask: true
dtype: float16
tokenizer_source: base
""")
    assert str(recipe.base) == "base/model"
    assert [str(r) for r in recipe.inputs] == ["org/one@main", "org/two"]
    assert recipe.inputs[0].path == "org/one"
    assert recipe.inputs[0].revision == "main"
    assert recipe.stored_dtype == "float16"
    assert recipe.notes == ["int8_mask has no effect here: masks are never stored"]
    resolved = {p.name: p for p in recipe.resolve(LLAMA)}
    assert list(resolved) == LLAMA
    plan = resolved["model.layers.1.mlp.down_proj.weight"]
    assert plan.sources == (plan.name, plan.name)
    assert plan.base_source == plan.name
    assert plan.models == (0, 1)
    assert plan.parameters["weight"] == [1.0, 0.5]
    assert plan.parameters["density"] == pytest.approx([0.85, 0.33])
    assert plan.parameters["normalize"] is True
    assert plan.parameters["lambda"] == 1.0
    assert resolved["lm_head.weight"].parameters["weight"] == [1.0, 0.0]


@pytest.mark.parametrize("word", ["true", "True", "yes", "on", "1", '"true"'])
def test_yaml_1_1_words_for_true_and_false(word):
    assert plans(HEAD + f"parameters: {{normalize: {word}}}")["lm_head.weight"]["normalize"] is True
    opposite = {"1": "0", "yes": "no", "on": "off"}.get(word, word.lower().replace("true", "false"))
    assert plans(HEAD + f"parameters: {{normalize: {opposite}}}")["lm_head.weight"]["normalize"] is False


def test_numbers_that_yaml_reads_as_text():
    assert plans(HEAD + "parameters: {lambda: 1e-5, steps: '4'}")["lm_head.weight"] == {
        "weight": [1.0], "density": [1.0], "lambda": 1e-5, "normalize": True, "steps": 4, "scope": "tensor", "select": None,
    }  # fmt: skip


def test_a_list_parameter_is_not_a_gradient():
    found = plans(HEAD + "parameters: {select: [mlp, attn]}")
    assert {tuple(p["select"]) for p in found.values()} == {("mlp", "attn")}


def test_merge_keys_and_anchors():
    text = "merge_method: probe\nbase_model: b\nmodels:\n- model: a\n  parameters: &p {weight: 1, density: 0.5}\n"
    text += "- model: c\n  parameters: {<<: *p, density: 0.25}\n"
    assert plans(text)["lm_head.weight"]["density"] == [0.5, 0.25]
    assert plans(text)["lm_head.weight"]["weight"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("written", "path", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@abc", "org/name", "abc"),
        ("./some/dir", "./some/dir", None),
        ("{model: {path: org/name, revision: abc}}", "org/name", "abc"),
        ("{model: org/name@abc, override_architecture: X}", "org/name", "abc"),
    ],
)
def test_model_references(written, path, revision):
    ref = parse(f"merge_method: linear\nmodels:\n- model: {written}\n  parameters: {{weight: 1}}").inputs[0]
    assert (ref.path, ref.revision) == (path, revision)


def test_a_folder_with_at_and_plus_in_its_name_is_a_folder(tmp_path):
    folder = tmp_path / "a@b+c"
    folder.mkdir()
    (ref,) = parse(f"merge_method: linear\nmodels:\n- model: {folder}\n  parameters: {{weight: 1}}").inputs
    assert ref.path == str(folder)
    assert ref.lora is None


def test_base_of_a_method_that_ignores_it_is_a_model_like_others():
    text = "merge_method: linear\nbase_model: b\nparameters: {weight: 1}\nmodels: [{model: b}, {model: a}]"
    (plan,) = parse(text).resolve(["w"])
    assert plan.base_source is None
    assert plan.sources == ("w", "w")
    assert str(parse(text).template) == "b"


def test_without_a_base_the_first_model_is_the_template():
    assert str(parse("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: c}, {model: a}]").template) == "c"


# ---- depth, gradients, filters, precedence


@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("model.embed_tokens.weight", 0.0),
        ("model.layers.0.mlp.down_proj.weight", 0.0),
        ("model.layers.1.mlp.down_proj.weight", 0.25),
        ("model.layers.4.self_attn.q_proj.weight", 1.0),
        ("model.norm.weight", 0.0),  # mergekit's rule: outside the layers is 0, also after them
        ("lm_head.weight", 0.0),
    ],
)
def test_depth_of_a_tensor(name, t):
    assert plans(HEAD + "parameters: {lambda: [0, 1]}")[name]["lambda"] == t


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["layers.0.w", "layers.1.w"], [0, 1]),  # no prefix
        (["model.layers.0.w"], [1]),  # one layer is the end, as in mergekit
        (["h.0.w", "h.2.w", "wte.weight", "ln_f.weight"], [0, 1, 0, 0]),  # GPT-2
        (["encoder.block.1.layer.0.w", "decoder.block.1.layer.0.w", "decoder.block.2.layer.0.w"], [1, 0.5, 1]),  # T5
        (["visual.conv1.weight", "visual.transformer.resblocks.5.w", "visual.proj"], [0, 1, 0]),  # CLIP
        (["vit.patch_embed.proj.weight", "vit.blocks.1.w", "vit.blocks.4.w", "vit.head.weight"], [0, 0.25, 1, 0]),
    ],
)
def test_depth_needs_no_architecture(names, depths):
    found = plans(HEAD + "parameters: {lambda: [0, 1]}", names)
    assert [found[n]["lambda"] for n in names] == depths


BEFORE = [
    "model.embed_tokens.weight", "wte.weight", "wpe.weight", "gpt_neox.embed_in.weight", "vit.patch_embed.proj.weight",
    "bert.embeddings.word_embeddings.weight", "vit.cls_token", "visual.conv1.weight", "visual.class_embedding", "emb.weight",
]  # fmt: skip
AFTER = [
    "model.norm.weight",
    "lm_head.weight",
    "embed_out.weight",
    "unembed.W_U",
    "ln_f.bias",
    "bert.pooler.dense.weight",
]


def test_slices_take_embeddings_from_the_first_and_the_rest_from_the_last():
    text = "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
    text += "- sources: [{model: a, layer_range: [0, 1]}]\n- sources: [{model: c, layer_range: [0, 1]}]\n"
    found = {p.name: p.models for p in parse(text).resolve([*BEFORE, "layers.0.w", *AFTER])}
    assert [found[n] for n in BEFORE] == [(0,)] * len(BEFORE)
    assert [found[n] for n in AFTER] == [(1,)] * len(AFTER)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_gradients_interpolate_linearly(values, t):
    grid = np.linspace(0, 1, len(values)) if len(values) > 1 else [0.0]
    assert Gradient(tuple(values)).at(t) == pytest.approx(np.interp(t, grid, values), rel=1e-12, abs=1e-12)


def test_gradients_hit_their_values_exactly_and_words_are_held():
    assert [Gradient((0.1, 0.7, 0.3)).at(t) for t in (0, 0.5, 1)] == [0.1, 0.7, 0.3]
    assert [Gradient((True, False)).at(t) for t in (0, 0.99, 1)] == [True, True, False]


def test_the_first_filter_that_matches_counts_and_a_star_matches_all():
    text = (
        HEAD
        + "parameters: {lambda: [{filter: mlp, value: [0, 1]}, {filter: '*', value: 3}, {filter: q_proj, value: 9}]}"
    )
    found = plans(text)
    assert found["model.layers.2.mlp.down_proj.weight"]["lambda"] == 0.5
    assert found["model.layers.2.self_attn.q_proj.weight"]["lambda"] == 3.0


def test_the_innermost_level_that_has_a_value_for_a_tensor_wins():
    text = """
merge_method: probe
base_model: b
modules:
  default:
    parameters: {density: 0.5, lambda: 4}
    slices:
    - parameters: {density: 0.25, lambda: [{filter: mlp, value: 6}]}
      sources:
      - {model: b, layer_range: [0, 5]}
      - {model: a, layer_range: [0, 5], parameters: {density: [{filter: mlp, value: 0.1}]}}
      - {model: c, layer_range: [0, 5], parameters: {weight: 2}}
parameters: {weight: 1, density: 0.9, lambda: 5}
"""
    found = plans(text)
    mlp, attention = found["model.layers.0.mlp.down_proj.weight"], found["model.layers.0.self_attn.q_proj.weight"]
    assert mlp["weight"] == [1.0, 2.0]
    assert mlp["density"] == [0.1, 0.25]  # source, slice
    assert attention["density"] == [0.25, 0.25]  # no filter of the source matches: the slice's
    assert mlp["lambda"] == 6.0
    assert attention["lambda"] == 4.0  # module before global


def test_slices_renumber_layers_and_count_depth_within_themselves():
    text = """
merge_method: probe
base_model: b
slices:
- sources:
  - {model: b, layer_range: [0, 3]}
  - {model: a, layer_range: [0, 3], parameters: {weight: [0, 1]}}
- sources:
  - {model: b, layer_range: [1, 5]}
  - {model: c, layer_range: [0, 4]}
  parameters:
    weight: [{filter: layers.1., value: 7}, {filter: layers.6., value: 8}, {value: [0, 3]}]
    lambda: [{filter: layers.6., value: 2}, {value: 1}]
"""
    recipe = parse(text)
    found = {p.name: p for p in recipe.resolve(LLAMA)}
    assert [str(r) for r in recipe.inputs] == ["a", "c"]
    assert len(found) == 2 * 7 + 3
    q = [found[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(7)]
    assert [p.base_source for p in q] == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1, 2, 1, 2, 3, 4)]
    assert [p.sources for p in q] == [(f"model.layers.{i}.self_attn.q_proj.weight",) for i in (0, 1, 2, 0, 1, 2, 3)]
    assert [p.models for p in q] == [(0,)] * 3 + [(1,)] * 4
    assert [p.parameters["weight"][0] for p in q] == pytest.approx([0, 0.5, 1, 0, 7, 2, 3])  # the model's own name
    assert [p.parameters["lambda"] for p in q] == [1, 1, 1, 1, 1, 1, 2]  # the name in the output
    assert found["model.embed_tokens.weight"].models == (0,)  # from the first slice
    assert found["lm_head.weight"].models == (1,)  # from the last
    assert found["lm_head.weight"].parameters["weight"] == [0.0]
    assert recipe.layer_sources() == [(recipe.base, i) for i in (0, 1, 2, 1, 2, 3, 4)]


def test_a_slice_may_leave_out_the_base_where_its_layers_are_clear():
    text = "merge_method: probe\nbase_model: b\nparameters: {weight: 1}\nslices:\n"
    text += "- sources: [{model: a, layer_range: [1, 3]}, {model: c, layer_range: [1, 3]}]"
    found = {p.name: p.base_source for p in parse(text).resolve(LLAMA)}
    assert found["model.layers.0.mlp.down_proj.weight"] == "model.layers.1.mlp.down_proj.weight"


def test_the_base_may_be_named_in_the_slices():
    text = "merge_method: probe\nparameters: {weight: 1}\nslices:\n- base_model: b\n"
    text += "  sources: [{model: b, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]"
    recipe = parse(text)
    assert str(recipe.base) == "b"
    assert [str(r) for r in recipe.inputs] == ["a"]


def test_layers_of_another_length_come_with_their_own_names():
    text = "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
    text += "- sources: [{model: a, layer_range: [0, 2]}]\n- sources: [{model: c, layer_range: [6, 8]}]\n"
    recipe = parse(text)
    other = [n.replace("layers.0", "layers.7").replace("layers.1.", "layers.6.") for n in LLAMA]
    other += ["model.layers.7.extra.weight"]
    found = {p.name: p.sources for p in recipe.resolve(LLAMA, {recipe.inputs[1]: other})}
    assert found["model.layers.3.extra.weight"] == ("model.layers.7.extra.weight",)
    assert "model.layers.2.extra.weight" not in found


# ---- from Python


def test_a_call_is_a_recipe():
    recipe = Recipe.from_call("probe", "b", ["x", "y"], {"weight": [0.5, 0.25], "density": 0.2, "lambda_": 0.7})
    (plan,) = recipe.resolve(["w"])
    assert plan.parameters["weight"] == [0.5, 0.25]
    assert plan.parameters["density"] == [0.2, 0.2]
    assert plan.parameters["lambda"] == 0.7


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_per_model_values_come_as_any_sequence(make):
    (plan,) = Recipe.from_call("probe", "b", ["x", "y"], {"weight": make([1.0, 2.0])}).resolve(["w"])
    assert plan.parameters["weight"] == [1.0, 2.0]


def test_per_model_values_may_be_gradients_and_filters():
    gradient = [[0, 1], [{"filter": "mlp", "value": 2}, {"value": 3}]]
    found = {
        p.name: p.parameters["weight"]
        for p in Recipe.from_call("probe", "b", ["x", "y"], {"weight": gradient}).resolve(LLAMA)
    }
    assert found["model.layers.1.mlp.down_proj.weight"] == [0.25, 2.0]
    shared = [{"filter": "mlp", "value": 2}, {"value": 3}]
    found = {
        p.name: p.parameters["weight"]
        for p in Recipe.from_call("probe", "b", ["x", "y"], {"weight": shared}).resolve(LLAMA)
    }
    assert found["lm_head.weight"] == [3.0, 3.0]


def test_numpy_scalars_are_numbers():
    call = Recipe.from_call(
        "probe", "b", ["x"], {"weight": np.float32(0.5), "steps": np.int64(2), "normalize": np.bool_(False)}
    )
    assert call.resolve(["w"])[0].parameters["weight"] == [0.5]
    assert call.resolve(["w"])[0].parameters["normalize"] is False


def test_the_wrong_number_of_values_is_named():
    with pytest.raises(BadInput, match="weight has 3 values for 2 models"):
        Recipe.from_call("probe", "b", ["x", "y"], {"weight": [1, 2, 3]})


def test_a_call_written_as_yaml_is_the_same_recipe():
    call = Recipe.from_call(
        "probe", "b", ["x", "org/y@rev"], {"weight": [0.5, [0, 1]], "lambda": 2}, out_dtype="bfloat16", seed=7
    )
    again = parse(call.to_yaml())
    assert again.resolve(LLAMA) == call.resolve(LLAMA)
    assert again.inputs == call.inputs
    assert (again.stored_dtype, again.seed) == ("bfloat16", 7)


def test_the_users_own_text_is_kept():
    text = HEAD + "# a comment\n"
    assert parse(text).to_yaml() == text


# ---- what is refused: the message, its line, its remedy

BAD = {
    "typo at the top": ("merge_metod: probe\nmodels: []", "unknown key 'merge_metod' (did you mean 'merge_method'?)", "r.yml:1"),
    "typo in a model": (HEAD + "- modle: c\n", "unknown key 'modle' (did you mean 'model'?)", "r.yml:6 (models[1].modle)"),
    "parameters misspelt": (
        "merge_method: probe\nbase_model: b\nmodels:\n- model: a\n  paramters: {weight: 1}",
        "unknown key 'paramters' (did you mean 'parameters'?)",
        "r.yml:5 (models[0].paramters)",
    ),
    "typo in a parameter": (
        HEAD.replace("weight: 1", "weight: 1, densty: 0.2"),
        "probe has no parameter 'densty' (did you mean 'density'?)",
        "r.yml:5 (models[0].parameters.densty)",
    ),
    "typo in a slice": (
        "merge_method: probe\nbase_model: b\nslices:\n- sorces: []\n",
        "unknown key 'sorces' (did you mean 'sources'?)",
        "r.yml:4 (slices[0].sorces)",
    ),
    "typo in a source": (
        "merge_method: probe\nbase_model: b\nslices:\n- sources:\n  - {model: a, layer_rnge: [0, 1]}\n",
        "unknown key 'layer_rnge' (did you mean 'layer_range'?)",
        "r.yml:5 (slices[0].sources[0].layer_rnge)",
    ),
    "typo in a filter": (
        HEAD + "parameters: {lambda: [{filtr: x, value: 1}]}",
        "unknown key 'filtr' (did you mean 'filter'?)",
        "r.yml:6 (parameters.lambda[0].filtr)",
    ),
    "a parameter at the top": (HEAD + "density: 0.5", "unknown key 'density'", "r.yml:6 (density)"),
    "unknown method": ("merge_method: prob\nmodels: []", "unknown merge method 'prob' (did you mean 'probe'?)", "r.yml:1"),
    "no method": ("models: []", "merge_method is missing", "r.yml"),
    "empty file": ("", "the recipe is empty", "r.yml"),
    "a list": ("- 1", "a recipe is a mapping", "r.yml"),
    "not YAML": ("merge_method: [", "not valid YAML", "r.yml:1, column 16"),
    "tab": ("models:\n\t- model: a", "not valid YAML", "r.yml:2, column 1"),
    "two documents": ("a: 1\n---\nb: 2", "several YAML documents", "r.yml:2"),
    "a key twice": ("merge_method: probe\nmerge_method: linear", "key 'merge_method' is written twice", "r.yml:2"),
    "a tag": ("merge_method: !!python/name:os.system x", "is not allowed", "r.yml:1"),
    "density above 1": (
        HEAD.replace("weight: 1", "weight: 1, density: 7"),
        "density must be in [0, 1], not 7",
        "r.yml:5 (models[0].parameters.density)",
    ),
    "density below 0 in a gradient": (
        HEAD + "parameters: {density: [0.5, -2]}",
        "density must be in [0, 1], not -2",
        "r.yml:6 (parameters.density[1])",
    ),
    "density out of range behind a filter": (
        HEAD + "parameters:\n  density:\n  - filter: mlp\n    value: 1.5\n  - value: 1\n",
        "density must be in [0, 1], not 1.5",
        "r.yml:9 (parameters.density[0].value)",
    ),
    "infinite weight": (HEAD + "- {model: c, parameters: {weight: .inf}}", "weight must be finite, not inf", "r.yml:6"),
    "weight not a number": (HEAD + "- {model: c, parameters: {weight: .nan}}", "weight must be finite, not nan", "r.yml:6"),
    "a word for a number": (HEAD + "parameters: {lambda: big}", "lambda must be a number, not 'big'", "r.yml:6"),
    "half a step": (HEAD + "parameters: {steps: 2.5}", "steps must be a whole number, not 2.5", "r.yml:6"),
    "infinitely many steps": (HEAD + "parameters: {steps: .inf}", "steps", "r.yml:6"),
    "an unknown choice": (HEAD + "parameters: {scope: word}", "scope must be one of tensor, model, not 'word'", "r.yml:6"),
    "not a boolean": (HEAD + "parameters: {normalize: maybe}", "normalize must be true or false, not 'maybe'", "r.yml:6"),
    "an empty gradient": (HEAD + "parameters: {lambda: []}", "lambda is an empty list", "r.yml:6"),
    "a mixed list": (HEAD + "parameters: {lambda: [1, {value: 2}]}", "lambda mixes plain values and", "r.yml:6"),
    "a filter without a value": (HEAD + "parameters: {lambda: [{filter: x}]}", "an entry of lambda has no value", "r.yml:6"),
    "no weight": (
        "merge_method: probe\nbase_model: b\nmodels:\n- model: a\n",
        "probe needs a weight for model a",
        "r.yml:4 (models[0])",
    ),
    "no t": ("merge_method: probe_pair\nmodels: [{model: a}, {model: c}]", "probe_pair needs t", "r.yml:1"),
    "a global parameter on a model": (
        HEAD.replace("weight: 1", "weight: 1, normalize: true"),
        "normalize applies to the whole merge, not to one model",
        "r.yml:5 (models[0].parameters.normalize)",
    ),
    "no base": ("merge_method: probe\nmodels: [{model: a, parameters: {weight: 1}}]", "probe needs a base model", "r.yml:1"),
    "only the base": ("merge_method: probe\nbase_model: b\nmodels: [{model: b}]", "takes 1 to 3 models besides the base, not 0", "r.yml:3"),
    "too many models": (
        "merge_method: probe\nbase_model: b\nparameters: {weight: 1}\nmodels: [{model: a}, {model: c}, {model: d}, {model: e}]",
        "probe takes 1 to 3 models besides the base, not 4",
        "r.yml:4 (models)",
    ),
    "too few models": ("merge_method: probe_pair\nparameters: {t: 0}\nmodels: [{model: a}]", "takes exactly 2 models, not 1", "r.yml:3"),
    "the base twice": (HEAD + "- model: b\n- model: b", "the base model b is listed twice", "r.yml:7"),
    "models and slices": (HEAD + "slices: []", "has both models and slices", "r.yml:1"),
    "no models": ("merge_method: probe\nbase_model: b", "says nothing about its models", "r.yml:1"),
    "models is a word": ("merge_method: probe\nbase_model: b\nmodels: a", "models must be a list, not 'a'", "r.yml:3"),
    "two modules": (
        "merge_method: linear\nparameters: {weight: 1}\nmodules: {x: {models: [{model: a}]}, y: {models: [{model: a}]}}",
        "2 modules are given; one is supported",
        "r.yml:3 (modules)",
    ),
    "an unknown dtype": (HEAD + "dtype: bfloat61", "unknown dtype 'bfloat61' (did you mean 'bfloat16'?)", "r.yml:6 (dtype)"),
    "a LoRA": (HEAD + "- {model: c+adapter, parameters: {weight: 1}}", "LoRA adapters can not be merged", "r.yml:6"),
    "a tokenizer union": (HEAD + "tokenizer_source: union", "the tokenizer can only be copied from the base model", "r.yml:6"),
    "token surgery": (HEAD + "tokenizer: {source: base, tokens: {x: {source: a}}}", "editing tokens is not supported", "r.yml:6"),
    "a chat template": (HEAD + "chat_template: chatml", "chat_template is not supported", "r.yml:6"),
    "a residual": (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n- residual_weight: 0.5\n  sources: [{model: a, layer_range: [0, 1]}]",
        "residual_weight is not supported",
        "r.yml:4",
    ),
    "an empty layer range": (
        "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: [3, 3]}]}]",
        "layer_range [3, 3] is empty or negative",
        "r.yml:3",
    ),
    "a layer range of one number": (
        "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: [3]}]}]",
        "layer_range must be two whole numbers",
        "r.yml:3",
    ),
    "slices of different lengths": (
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: c, layer_range: [0, 3]}]",
        "the sources of a slice give different numbers of layers: [2, 3]",
        "r.yml:4",
    ),
    "a slice whose base is unclear": (
        "merge_method: probe\nbase_model: b\nparameters: {weight: 1}\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}, {model: c, layer_range: [1, 3]}]",
        "does not say which layers of the base model b",
        "r.yml:5",
    ),
    "another base in a slice": (
        "merge_method: probe\nbase_model: b\nparameters: {weight: 1}\nslices:\n"
        "- base_model: z\n  sources: [{model: a, layer_range: [0, 2]}]",
        "a slice with a base model of its own is not supported",
        "r.yml:5",
    ),
    "a revision that YAML reads as a number": (
        "merge_method: linear\nmodels: [{model: {model: {path: a, revision: 123456}}, parameters: {weight: 1}}]",
        "revision must be text (put quotes around it), not 123456",
        "r.yml:2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_recipes_are_refused_with_their_line(case):
    text, message, where = BAD[case]
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert message in str(caught.value)
    assert where in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_problems_are_reported_at_once():
    text = HEAD + "- {model: c, parameters: {weight: .inf, densty: 1}}\nparameters: {lambda: big}\nchat_template: auto"
    with pytest.raises(BadInput) as caught:
        parse(text)
    said = str(caught.value)
    assert said.startswith("4 problems with r.yml")
    for part in (
        "weight must be finite",
        "'densty' (did you mean 'density'?)",
        "lambda must be a number",
        "chat_template",
    ):
        assert part in said


def test_a_tensor_without_a_value_is_named():
    text = "merge_method: probe\nbase_model: b\nmodels:\n- model: a\n  parameters: {weight: {filter: mlp, value: 5}}"
    with pytest.raises(
        BadInput, match=r"weight of model a has no value for tensor model\.embed_tokens\.weight"
    ) as caught:
        parse(text).resolve(LLAMA)
    assert caught.value.where == "r.yml:5 (models[0].parameters.weight)"
    assert "value: and no filter:" in caught.value.remedy


def test_layers_that_a_model_does_not_have():
    text = "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources: [{model: a, layer_range: [0, 6]}]"
    with pytest.raises(BadInput, match=r"layer_range \[0, 6\] leaves model a, which has 5 layers") as caught:
        parse(text).resolve(LLAMA)
    assert caught.value.where == "r.yml:4 (slices[0].sources[0].layer_range)"


@pytest.mark.parametrize("names", [["w"], ["encoder.block.0.w", "decoder.block.0.w"]])
def test_slices_need_one_stack_of_layers(names):
    text = "merge_method: linear\nparameters: {weight: 1}\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]"
    with pytest.raises(BadInput, match="slices need a model with one stack of layers"):
        parse(text).resolve(names)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(BadInput, match="there is no recipe"):
        Recipe.load(tmp_path / "none.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadInput, match="can not be read"):
        Recipe.load(tmp_path / "binary.yml")
    with pytest.raises(BadInput, match="can not be read"):
        Recipe.load(pathlib.Path(tmp_path))


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abm:-[]{}&*!<>?|'\"\n\t 0,.", max_size=60))
def test_no_text_does_anything_but_parse_or_be_refused(text):
    try:
        recipe = parse(text)
    except BadInput:
        return
    assert recipe.inputs


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["filter", "value", "weight", "model", "x"]), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_no_value_of_a_parameter_breaks_anything(value):
    try:
        recipe = Recipe.from_call("probe", "b", ["x", "y"], {"weight": 1.0, "lambda": value, "density": value})
        for plan in recipe.resolve(LLAMA):
            assert math.isfinite(plan.parameters["lambda"])
            assert all(0 <= d <= 1 for d in plan.parameters["density"])
    except BadInput:
        pass

"""Recipes: mergekit's schema as it is, and what every tensor resolves to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import HEAD, LLAMA, parse

from fastmerge import BadInput, Recipe
from fastmerge._recipe_settings import Gradient

pytestmark = pytest.mark.usefixtures("probe")


def plans(text: str, names: list[str] = LLAMA) -> dict[str, dict]:
    return {p.name: p.parameters for p in parse(text).resolve(names)}


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

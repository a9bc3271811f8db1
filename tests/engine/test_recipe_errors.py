"""Recipes that are refused: the message, its line, its remedy."""

from __future__ import annotations

import math
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import HEAD, LLAMA, parse

from fastmerge import BadInput, Recipe

pytestmark = pytest.mark.usefixtures("probe")

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
    assert "what to do: " in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("case", "remedy"),
    [
        ("density above 1", "write a number from 0 to 1, or leave density out for 1"),
        ("infinite weight", "write a number that is finite"),
        ("half a step", "write a whole number that is finite, or leave steps out for 3"),
        ("an unknown choice", "write one of tensor, model, or leave scope out for tensor"),
        ("not a boolean", "write true or false, or leave normalize out for true"),
        ("only the base", "add models under models:"),
        ("too many models", "take models out of models:"),
        ("a layer range of one number", "write layer_range: [first, end), for example [0, 16]"),
        ("slices of different lengths", "give every source of the slice a layer_range: of the same length"),
        ("a revision that YAML reads as a number", "write text (put quotes around it) there"),
    ],
)
def test_remedies_say_what_to_write(case, remedy):
    with pytest.raises(BadInput) as caught:
        parse(BAD[case][0])
    assert caught.value.remedy.startswith(remedy)


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
    assert caught.value.remedy.startswith("end the range at 5 or before")


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

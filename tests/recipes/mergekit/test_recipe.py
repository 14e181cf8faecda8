"""mergekit's YAML: the forms that fit become the same formula; all others are refused by key."""

from pathlib import Path

import pytest

from drift_merge.errors import RecipeError, SourceError
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.files import read_recipe
from drift_merge.recipes.yaml import write_mapping
from tests import checkpoints as c
from tests.golden_files import GOLDEN, compare_with_golden
from tests.recipes.models import LAYERS, write_models, write_recipe

FORMS = sorted((GOLDEN / "recipes").glob("mergekit-*.yml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def refusal(directory, text):
    with pytest.raises(RecipeError) as raised:
        read_recipe(write_recipe(directory, text)).recipe()
    return raised.value


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_that_fits_becomes_the_golden_recipe_and_can_be_planned(models, form):
    request = read_recipe(write_recipe(models, form.read_text()))
    recipe = request.recipe()
    ours = write_mapping(request.values).replace(f"{models}/", "")
    compare_with_golden(f"recipes/{form.stem}.txt", ours)
    plan = prepare(recipe).plan()
    assert plan.counts()[recipe.method] >= len(c.text_shapes(LAYERS)) - 2


# Refusals: the key, the line where it can be told, and what to write instead.

TWO = "models: [{model: mllm, parameters: {weight: 1}}, {model: reasoner, parameters: {weight: 1}}]"
SLICES = """slices:
  - sources: [{model: mllm, layer_range: [0, 3]}, {model: reasoner, layer_range: [%s]}]
"""
STACKED = """slices:
  - sources: [{model: mllm, layer_range: [0, 3]}]
  - sources: [{model: reasoner, layer_range: [1, 4]}]
merge_method: passthrough
"""
REFUSED = {
    "stacked layers": (STACKED, "slices", 1),
    "a shifted range": (f"{SLICES % '1, 4'}merge_method: linear", "layer_range", 2),
    "a part of the layers": (f"{SLICES % '0, 3'}merge_method: linear", "slices", 1),
    "modules": (f"merge_method: linear\nmodules: {{text: {{models: []}}}}\n{TWO}", "modules", 2),
    "a union of tokenizers": (
        f"merge_method: linear\ntokenizer_source: union\n{TWO}",
        "tokenizer_source",
        2,
    ),
    "tokens": (f"merge_method: linear\ntokenizer: {{tokens: {{}}}}\n{TWO}", "tokenizer", 2),
    "a chat template": (f"merge_method: linear\nchat_template: auto\n{TWO}", "chat_template", 2),
    "an unknown key": (f"merge_method: linear\ndytpe: float16\n{TWO}", "dytpe", 2),
    "an unknown method": (f"merge_method: ramplus\n{TWO}", "merge_method", 1),
    "an unknown parameter": (
        f"merge_method: linear\nparameters:\n  wieght: 1\n{TWO}",
        "wieght",
        3,
    ),
    "a weight that is missing": (
        "merge_method: linear\nmodels: [{model: mllm, parameters: {weight: 1}}, {model: reasoner}]",
        "weight",
        None,
    ),
    "a base without a weight": (
        "merge_method: linear\nbase_model: mllm\n"
        "models: [{model: reasoner, parameters: {weight: 1}}]",
        "weight",
        None,
    ),
    "no base for task vectors": (f"merge_method: ties\n{TWO}", "base_model", None),
    "two densities": (
        "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nmodels:\n"
        "  - {model: mllm, parameters: {density: 0.5}}\n"
        "  - {model: reasoner, parameters: {density: 0.3}}",
        "density",
        6,
    ),
    "a density gradient": (
        "merge_method: ties\nbase_model: base\nparameters:\n  weight: 1\n"
        f"  density: [1, 0.7, 0.1]\n{TWO}",
        "density",
        5,
    ),
    "rescaled ties": (
        f"merge_method: ties\nbase_model: base\nparameters: {{rescale: true}}\n{TWO}",
        "rescale",
        3,
    ),
    "a LoRA": (
        "merge_method: linear\nmodels:\n  - model: mllm+adapter\n  - model: reasoner",
        "model",
        3,
    ),
    "no mllm": (
        "merge_method: linear\nmodels: [{model: base}, {model: reasoner}]",
        "models",
        2,
    ),
    "a model twice": (
        "merge_method: linear\nmodels:\n  - model: mllm\n  - model: mllm",
        "models",
        4,
    ),
    "nothing beside the mllm": (
        "merge_method: linear\nmodels: [{model: mllm, parameters: {weight: 1}}]",
        "models",
        2,
    ),
    "nearswap from a text model": (
        "merge_method: nearswap\nbase_model: base\nmodels: [{model: mllm}]",
        "base_model",
        2,
    ),
    "model stock on the mllm": (
        "merge_method: model_stock\nbase_model: mllm\nmodels: [{model: reasoner}, {model: other}]",
        "base_model",
        2,
    ),
    "a selection by variance on the mllm": (
        "merge_method: sce\nbase_model: mllm\nparameters: {select_topk: 0.5}\n"
        "models: [{model: reasoner}, {model: other}]",
        "base_model",
        2,
    ),
    "a flag that is none": (
        f"merge_method: linear\nparameters: {{normalize: 0.5}}\n{TWO}",
        "normalize",
        2,
    ),
    "a number that is none": (
        "merge_method: linear\nmodels:\n  - {model: mllm, parameters: {weight: much}}\n"
        "  - {model: reasoner, parameters: {weight: 1}}",
        "weight",
        3,
    ),
    "models and slices": (f"{STACKED}{TWO}", "models", None),
    "passthrough of one model": (
        "merge_method: passthrough\nmodels: [{model: mllm}]",
        "merge_method",
        1,
    ),
}


@pytest.mark.parametrize(("text", "key", "line"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_not_supported_is_refused_by_key_and_line_with_a_way_out(models, text, key, line):
    error = refusal(models, text)
    where = "recipe.yml" if line is None else f"recipe.yml, line {line}"
    assert f"{where}: mergekit's {key}: " in error.message
    assert error.remedy


def test_several_documents_are_refused(models):
    assert (
        "single document" in refusal(models, f"merge_method: linear\n{TWO}\n---\nname: x").message
    )


def test_two_multimodal_models_are_refused(models, tmp_path):
    c.write_checkpoint(tmp_path / "twin", c.mllm_tensors(LAYERS, seed=9), c.mllm_config(LAYERS))
    text = f"merge_method: linear\nmodels: [{{model: mllm}}, {{model: {tmp_path / 'twin'}}}]"
    assert "are all multimodal" in refusal(models, text).message


def test_a_model_that_is_not_there_is_named(models):
    text = "merge_method: linear\nmodels: [{model: mllm}, {model: ./absent}]"
    with pytest.raises(SourceError, match=r"\./absent"):
        read_recipe(write_recipe(models, text))


def test_an_unknown_name_is_answered_with_the_nearest(models):
    assert "Did you mean dare_ties?" in refusal(models, f"merge_method: dare_tie\n{TWO}").message
    assert (
        "Did you mean dtype?" in refusal(models, f"merge_method: linear\ndytpe: x\n{TWO}").message
    )


def test_flags_override_what_was_translated(models):
    request = read_recipe(write_recipe(models, (GOLDEN / "recipes/mergekit-ties.yml").read_text()))
    recipe = request.recipe({"modules": "attn", "density": 0.9, "dtype": "source"})
    assert (recipe.modules, recipe.options["density"], recipe.dtype) == ("attn", 0.9, "source")


def test_the_mllm_is_found_by_its_tensors_where_the_config_does_not_say(models, tmp_path):
    config = c.mllm_config(LAYERS)
    del config["vision_config"]
    c.write_checkpoint(tmp_path / "plain", c.mllm_tensors(LAYERS), config)
    text = (
        f"merge_method: linear\nparameters: {{weight: 1}}\n"
        f"models: [{{model: {tmp_path / 'plain'}}}, {{model: reasoner}}]"
    )
    request = read_recipe(write_recipe(models, text))
    assert Path(request.values["mllm"]) == tmp_path / "plain"
    assert "mllm" in request.notes[0]

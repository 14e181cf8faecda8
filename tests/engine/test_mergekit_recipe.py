"""mergekit's YAML: the forms that fit become the same formula; all others are refused by key."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from drift_merge.engine.job import RunOptions
from drift_merge.engine.prepare import prepare
from drift_merge.engine.recipe_file import read_request
from drift_merge.engine.recipe_yaml import write_mapping
from drift_merge.errors import RecipeError, SourceError
from drift_merge.merges.make import make_merge
from tests import checkpoints as c
from tests.golden_files import GOLDEN, compare_with_golden

FORMS = sorted((GOLDEN / "recipes").glob("mergekit-*.yml"))
LAYERS = 4
WORDS = {"tokenizer.json": c.tokenizer()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with `mllm`, `reasoner`, `other` and `base` in it, in float32."""
    directory = tmp_path_factory.mktemp("models")
    c.make_pair(directory, layers=LAYERS, dtype="F32", reasoner_sidecars=WORDS, mllm_sidecars=WORDS)
    for seed, name in enumerate(("base", "other"), start=7):
        tensors = c.reasoner_tensors(LAYERS, seed=seed, dtype="F32")
        c.write_checkpoint(directory / name, tensors, c.text_config(LAYERS), sidecars=WORDS)
    return directory


def write(directory, text):
    file = directory / "recipe.yml"
    file.write_text(text)
    return file


def refusal(directory, text):
    with pytest.raises(RecipeError) as raised:
        read_request(write(directory, text)).recipe()
    return raised.value


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_a_form_that_fits_becomes_the_golden_recipe_and_can_be_planned(models, form):
    request = read_request(write(models, form.read_text()))
    recipe = request.recipe()
    ours = write_mapping(request.values).replace(f"{models}/", "")
    compare_with_golden(f"recipes/{form.stem}.txt", ours)
    plan = prepare(recipe).plan()
    assert plan.counts()[recipe.method] >= len(c.text_shapes(LAYERS)) - 2


# Numbers: the formula of each method in float64, with mergekit's own lookup of parameters.


def run(models, tmp_path, text):
    recipe = read_request(write(models, text)).recipe()
    prepared = prepare(recipe, quiet=True)
    make_merge(prepared, prepared.plan(), tmp_path / "out", RunOptions(threads=1))
    return c.read_tensors(tmp_path / "out")


def load(models):
    names = ("mllm", "reasoner", "other", "base")
    return {name: c.read_tensors(models / name) for name in names}


def setting(value, name):
    """mergekit's lookup for one tensor: filters in order; gradients begin outside the layers."""
    if isinstance(value, dict):
        return next(setting(v, name) for key, v in value.items() if key in name or key == "*")
    if isinstance(value, list):
        found = re.search(r"layers\.(\d+)\.", name)
        place = int(found[1]) / (LAYERS - 1) if found else 0.0
        return float(np.interp(place * (len(value) - 1), range(len(value)), value))
    return value


def compare(merged, models, formula):
    loaded = load(models)
    for name, tensor in merged.items():
        own = loaded["mllm"][name].values.astype(np.float64)
        if name.startswith("visual."):
            assert tensor == loaded["mllm"][name]
            continue
        others = {n: t[name].values.astype(np.float64) for n, t in loaded.items() if n != "mllm"}
        expected = formula(name, own, **others)
        scale = max(np.abs(v).max() for v in (own, *others.values()))
        assert np.abs(tensor.values - expected).max() <= 16 * 2**-24 * scale, name


def test_linear_is_the_weighted_mean_of_all_models(models, tmp_path):
    text = """
models:
  - {model: mllm, parameters: {weight: {filter: lm_head, value: 1.0}}}
  - {model: reasoner, parameters: {weight: [0, 1, 3]}}
  - {model: other}
parameters: {weight: 0.5}
merge_method: linear
dtype: float32
"""

    def formula(name, mllm, reasoner, other, base):
        own, first = (setting(v, name) for v in ({"lm_head": 1.0, "*": 0.5}, [0, 1, 3]))
        return (own * mllm + first * reasoner + 0.5 * other) / (own + first + 0.5)

    compare(run(models, tmp_path, text), models, formula)


T = {"self_attn": [0, 0.5, 0.3, 0.7, 1], "mlp": [1, 0.5, 0.7, 0.3, 0], "*": [0.2, 0.8]}


def slerp(t, one, other):
    angle = np.arccos(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other))
    if np.cos(angle) > 0.9995:
        return (1 - t) * one + t * other
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)


@pytest.mark.parametrize("base", ["mllm", "reasoner"])
def test_slerp_goes_from_the_base_model_to_the_other_by_filters_and_gradients(
    models, tmp_path, base
):
    cases = [{"filter": key, "value": value} for key, value in T.items()]
    text = f"""
models: [{{model: mllm}}, {{model: reasoner}}]
merge_method: slerp
base_model: {base}
dtype: float32
parameters: {{t: {json.dumps(cases)}}}
"""

    def formula(name, mllm, reasoner, other, base_):
        pair = (mllm, reasoner) if base == "mllm" else (reasoner, mllm)
        return slerp(setting(T, name), *pair)

    merged = run(models, tmp_path, text)
    compare(merged, models, lambda name, own, **o: formula(name, own, base_=o.pop("base"), **o))


def trimmed(tau, density):
    kept = np.zeros(tau.size)
    order = np.argsort(-np.abs(tau).ravel(), kind="stable")[: int(density * tau.size)]
    kept[order] = tau.ravel()[order]
    return kept.reshape(tau.shape)


@pytest.mark.parametrize("base", ["base", "mllm"])
def test_ties_elects_the_weighted_sign_and_divides_by_the_agreeing_weights(models, tmp_path, base):
    listed = ["reasoner", "other"] if base == "mllm" else ["mllm", "reasoner"]
    text = f"""
models:
  - {{model: {listed[0]}, parameters: {{weight: 0.3}}}}
  - {{model: {listed[1]}, parameters: {{weight: [0.2, 0.9]}}}}
merge_method: ties
base_model: {base}
dtype: float32
parameters: {{density: 0.5, lambda: 0.8, normalize: true}}
"""

    def formula(name, own, **others):
        models = {"mllm": own, **others}
        origin, weights = models[base], (0.3, setting([0.2, 0.9], name))
        taus = [trimmed(models[n] - origin, 0.5) * w for n, w in zip(listed, weights, strict=True)]
        sign = np.where(sum(taus) >= 0, 1, -1)
        agree = [np.sign(tau) == sign for tau in taus]
        total = sum(tau * a for tau, a in zip(taus, agree, strict=True))
        divisor = sum(w * a for w, a in zip(weights, agree, strict=True))
        return origin + 0.8 * total / np.where(divisor == 0, 1, divisor)

    compare(run(models, tmp_path, text), models, formula)


@pytest.mark.parametrize("base", ["base", "mllm"])
@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic_adds_the_weighted_task_vectors_to_its_base(
    models, tmp_path, base, normalize
):
    listed = ["reasoner", "other"] if base == "mllm" else ["mllm", "reasoner"]
    text = f"""
models:
  - {{model: {listed[0]}, parameters: {{weight: {{filter: mlp, value: 0.7}}}}}}
  - {{model: {listed[1]}, parameters: {{weight: 0.4}}}}
merge_method: task_arithmetic
base_model: {base}
dtype: float32
parameters: {{weight: 0.1, normalize: {str(normalize).lower()}}}
"""

    def formula(name, own, **others):
        models = {"mllm": own, **others}
        weights = (setting({"mlp": 0.7, "*": 0.1}, name), 0.4)
        total = sum(w * (models[n] - models[base]) for n, w in zip(listed, weights, strict=True))
        return models[base] + total / (sum(weights) if normalize else 1)

    compare(run(models, tmp_path, text), models, formula)


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
        read_request(write(models, text))


def test_an_unknown_name_is_answered_with_the_nearest(models):
    assert "Did you mean dare_ties?" in refusal(models, f"merge_method: dare_tie\n{TWO}").message
    assert (
        "Did you mean dtype?" in refusal(models, f"merge_method: linear\ndytpe: x\n{TWO}").message
    )


def test_flags_override_what_was_translated(models):
    request = read_request(write(models, (GOLDEN / "recipes/mergekit-ties.yml").read_text()))
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
    request = read_request(write(models, text))
    assert Path(request.values["mllm"]) == tmp_path / "plain"
    assert "mllm" in request.notes[0]

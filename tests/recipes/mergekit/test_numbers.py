"""What a recipe of mergekit's merges to: its formulas and its lookup of parameters, in float64."""

import json
import re

import numpy as np
import pytest

from drift_merge.engine.job import RunOptions
from drift_merge.merges.make import make_merge
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.files import read_recipe
from tests import checkpoints as c
from tests.recipes.models import LAYERS, write_models, write_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def run(models, tmp_path, text):
    recipe = read_recipe(write_recipe(models, text)).recipe()
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

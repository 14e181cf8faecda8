"""LoRA adapters as reasoners: theta = base + s B A, streamed, equals the merged weights."""

import numpy as np
import pytest

from drift_merge.engine.job import RunOptions
from drift_merge.errors import CheckpointError
from drift_merge.merges.make import make_merge
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe
from tests import checkpoints as c
from tests.merges.adapters import NAME, RANK, write_adapter


@pytest.fixture
def pair(tmp_path):
    return c.make_pair(tmp_path)


def merged(pair, out, adapter, **values):
    recipe = Recipe(
        reasoners=(str(adapter),), mllm=str(pair.mllm), modules="attn,mlp,norm", **values
    )
    prepared = prepare(recipe)
    make_merge(prepared, prepared.plan(), out, RunOptions(threads=1))
    return c.read_tensors(out)


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 6 / RANK), ({"use_rslora": True}, 6 / np.sqrt(RANK)), ({"lora_alpha": 1}, 1 / RANK)],
)
def test_passthrough_of_an_adapter_is_base_plus_the_scaled_product(tmp_path, pair, config, scale):
    product = write_adapter(tmp_path / "lora", pair.reasoner, **config)
    found = merged(pair, tmp_path / "out", tmp_path / "lora", method="passthrough", dtype="float32")
    base = c.read_tensors(pair.reasoner)
    expected = base[NAME].values.astype(np.float64) + scale * product
    # RANK + 1 roundings of float32, of terms no larger than the largest.
    bound = (RANK + 2) * 2.0**-24 * (np.abs(expected).max() + scale * np.abs(product).max())
    assert np.abs(found[NAME].values - expected).max() <= bound
    other = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(found[other].values, base[other].values)


def test_task_arithmetic_adds_the_product_and_nothing_else(tmp_path, pair):
    product = write_adapter(tmp_path / "lora", pair.reasoner)
    values = {"method": "task-arithmetic", "base": str(pair.reasoner), "dtype": "float32"}
    found = merged(pair, tmp_path / "out", tmp_path / "lora", weights=(0.5,), **values)
    mllm = c.read_tensors(pair.mllm)
    expected = mllm[NAME].values.astype(np.float64) + 0.5 * 3.0 * product
    assert np.abs(found[NAME].values - expected).max() <= 1e-6 * np.abs(expected).max()
    other = "model.layers.0.mlp.up_proj.weight"
    assert np.abs(found[other].values - mllm[other].values).max() <= 2.0**-22


def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path, pair):
    write_adapter(tmp_path / "dora", pair.reasoner, use_dora=True)
    with pytest.raises(CheckpointError, match="not plain LoRA"):
        merged(pair, tmp_path / "out", tmp_path / "dora", method="passthrough")


def test_factors_that_fit_no_tensor_are_refused_by_name(tmp_path, pair):
    stray = {
        "base_model.model.model.layers.9.self_attn.o_proj.lora_A.weight": c.store(
            np.ones((2, 4), np.float32), "F32"
        )
    }
    write_adapter(tmp_path / "lora", pair.reasoner, factors=stray)
    with pytest.raises(CheckpointError, match=r"layers\.9\.self_attn\.o_proj"):
        merged(pair, tmp_path / "out", tmp_path / "lora", method="passthrough")


def test_the_factors_are_a_part_of_the_fingerprint(tmp_path, pair):
    write_adapter(tmp_path / "one", pair.reasoner)
    write_adapter(tmp_path / "two", pair.reasoner, lora_alpha=7)
    plans = [
        prepare(
            Recipe(method="passthrough", reasoners=(str(tmp_path / n),), mllm=str(pair.mllm))
        ).plan()
        for n in ("one", "two")
    ]
    assert plans[0].fingerprint() != plans[1].fingerprint()

"""Merges that look at the whole model first: FRANK's weights and TIES trimmed globally."""

import json

import numpy as np
import pytest

from drift_merge.engine.job import RunOptions
from drift_merge.errors import RecipeError
from drift_merge.merges.make import make_merge
from drift_merge.merges.manifest import open_merge
from drift_merge.merges.verify import verify_merge
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe
from tests import checkpoints as c


@pytest.fixture
def trio(tmp_path):
    pair = c.make_pair(tmp_path)
    c.write_checkpoint(
        tmp_path / "base",
        c.reasoner_tensors(seed=9),
        json.loads((pair.reasoner / "config.json").read_text()),
    )
    return pair.reasoner, pair.mllm, tmp_path / "base"


def merge(trio, out, threads=2, **values):
    reasoner, mllm, base = map(str, trio)
    recipe = Recipe(
        reasoners=(reasoner,), mllm=mllm, base=base, modules="attn,mlp", dtype="float32", **values
    )
    prepared = prepare(recipe)
    make_merge(prepared, prepared.plan(), out, RunOptions(threads=threads))
    return open_merge(out), c.read_tensors(out)


def taus(trio, names):
    tensors = [c.read_tensors(path) for path in trio]
    values = [{n: t[n].values.astype(np.float64) for n in names} for t in tensors]
    reasoner, mllm, base = values
    return (
        {n: mllm[n] - base[n] for n in names},
        {n: reasoner[n] - base[n] for n in names},
        base,
    )


def test_frank_weights_are_the_shares_of_the_squared_norms_of_each_layer(trio, tmp_path):
    made, found = merge(trio, tmp_path / "out", method="task-arithmetic", weights=("frank",))
    merged = [n for n, e in made.tensors.items() if e["method"] == "task-arithmetic"]
    ours, theirs, base = taus(trio, merged)
    for layer in range(2):
        names = [n for n in merged if f"layers.{layer}." in n]
        squared = [sum((tau[n] ** 2).sum() for n in names) for tau in (ours, theirs)]
        shares = np.array(squared) / sum(squared)
        for name in names:
            entry = made.tensors[name]
            assert [entry["mllm_weight"], *entry["weights"]] == pytest.approx(shares, rel=1e-5)
            expected = base[name] + shares[0] * ours[name] + shares[1] * theirs[name]
            bound = 1e-5 * np.abs(expected).max()
            assert np.abs(found[name].values - expected).max() <= bound
    verify_merge(made, reasoners=[str(trio[0])], mllm=str(trio[1]), base=str(trio[2]), sample=100)


def test_frank_is_refused_for_other_methods_and_beside_numbers(trio, tmp_path):
    reasoner, mllm, base = map(str, trio)
    for method, weights in (("ties", ("frank",)), ("task-arithmetic", ("frank", 0.5))):
        with pytest.raises(RecipeError, match="frank"):
            Recipe(
                method=method, reasoners=(reasoner, reasoner), mllm=mllm, base=base, weights=weights
            )


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_global_trimming_keeps_the_largest_entries_of_the_whole_task_vector(
    trio, tmp_path, density
):
    made, found = merge(
        trio, tmp_path / "out", method="ties", options={"density": density, "trim": "global"}
    )
    merged = [n for n, e in made.tensors.items() if e["method"] == "ties"]
    ours, theirs, base = taus(trio, merged)
    trimmed = []
    for tau in (ours, theirs):
        whole = np.sort(np.abs(np.concatenate([tau[n].ravel() for n in merged])))[::-1]
        threshold = whole[max(1, round(density * whole.size)) - 1]
        trimmed.append({n: np.where(np.abs(tau[n]) >= threshold, tau[n], 0.0) for n in merged})
    for name in merged:
        stacked = np.stack([t[name] for t in trimmed])
        agree = (np.sign(stacked) == np.sign(stacked.sum(0))) & (stacked != 0)
        count = np.maximum(agree.sum(0), 1)
        expected = base[name] + (stacked * agree).sum(0) / count
        assert np.abs(found[name].values - expected).max() <= 2.0**-22 * np.abs(expected).max()
    verify_merge(made, reasoners=[str(trio[0])], mllm=str(trio[1]), base=str(trio[2]), sample=3)


def test_global_trimming_gives_the_same_bytes_for_any_number_of_threads(trio, tmp_path):
    values = {"method": "ties", "options": {"density": 0.1, "trim": "global"}}
    _, one = merge(trio, tmp_path / "one", threads=1, **values)
    _, three = merge(trio, tmp_path / "three", threads=3, **values)
    assert one == three


def test_global_trimming_is_refused_for_other_methods(trio):
    reasoner, mllm, base = map(str, trio)
    with pytest.raises(RecipeError, match="has no option 'trim'"):
        Recipe(
            method="dare-ties",
            reasoners=(reasoner,),
            mllm=mllm,
            base=base,
            options={"trim": "global"},
        )

"""One parameter under two stored names: one result, written under every name."""

import json
import shutil

import numpy as np
import pytest

from drift_merge.errors import AlignmentError, VerificationError
from drift_merge.merges.manifest import open_merge
from drift_merge.merges.verify import verify_merge
from drift_merge.plans import prepare as preparing
from drift_merge.plans.copies import find_copies
from drift_merge.recipes.recipe import Recipe
from drift_merge.storage.checkpoint import open_checkpoint
from tests import checkpoints as c
from tests.plans.second_names import EMBED, HEAD, RECIPES, TOKENS, merge, opened, random, write
from tests.runs import run_apply, run_prior


@pytest.mark.parametrize("modules", ["embed", "full"])
@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("tied", [True, False, None])
def test_a_head_of_equal_bytes_gets_the_result_of_the_embedding(tmp_path, method, modules, tied):
    pair = write(tmp_path, tied=tied)
    recipe = dict(RECIPES[method])
    if method not in ("linear", "slerp"):
        tensors = {
            n: random(t.shape, 50 + i)
            for i, (n, t) in enumerate(c.read_tensors(pair.reasoner).items())
        }
        config = json.loads((pair.reasoner / "config.json").read_text())
        c.write_checkpoint(tmp_path / "base", tensors, config, sidecars=TOKENS)
        recipe["base"] = str(tmp_path / "base")
    made = merge(method, [pair.reasoner], pair.mllm, tmp_path / "out", modules, **recipe)
    found, before = c.read_tensors(tmp_path / "out"), c.read_tensors(pair.mllm)
    assert found[HEAD].data == found[EMBED].data != before[EMBED].data
    assert made.manifest["second_names"] == {EMBED: [HEAD]}
    assert made.tensors[HEAD]["second_name_of"] == EMBED
    assert made.tensors[HEAD]["method"] == method


def test_the_result_is_that_of_the_mllm_that_does_not_store_the_head(tmp_path):
    """Also where all tensors share one statistic: a second name must not count twice."""
    pair = write(tmp_path / "twice")
    once = tmp_path / "once"
    shutil.copytree(pair.mllm, once)
    c.write_shard(
        once / "model.safetensors",
        {n: t for n, t in c.read_tensors(pair.mllm).items() if n != HEAD},
    )
    base = tmp_path / "base"
    shutil.copytree(pair.reasoner, base)
    tensors = c.read_tensors(base)
    c.write_shard(
        base / "model.safetensors",
        {n: random(t.shape, i) for i, (n, t) in enumerate(tensors.items())},
    )
    for number, recipe in enumerate(
        (
            {"method": "ties", "options": {"density": 0.3, "trim": "global"}},
            {"method": "task-arithmetic", "weights": ("frank",)},
        )
    ):
        outs = []
        for name, mllm in (("a", pair.mllm), ("b", once)):
            out = tmp_path / f"{name}{number}"
            merge(
                recipe["method"],
                [pair.reasoner],
                mllm,
                out,
                base=str(base),
                **{k: v for k, v in recipe.items() if k != "method"},
            )
            outs.append(c.read_tensors(out))
        assert {n: t for n, t in outs[0].items() if n != HEAD} == outs[1]


def test_the_account_counts_one_parameter_and_says_its_second_name(tmp_path):
    pair = write(tmp_path)
    alignment = opened("linear", [pair.reasoner], pair.mllm, "embed").reasoners[0][1]
    assert (alignment.num_selected, alignment.num_matched) == (1, 1)
    (record,) = [r for r in alignment.records if r.status == "matched"]
    assert (record.mllm, record.second_names) == ((EMBED,), (HEAD,))
    listed = [name for r in alignment.records for name in (*r.mllm, *r.second_names)]
    assert sorted(listed) == sorted(c.read_tensors(pair.mllm))
    (said,) = [f for f in alignment.findings if f.code == "second_names"]
    assert said.message.startswith("1 parameter is stored under more than one name in the mllm")
    assert f"{HEAD} (= {EMBED})" in said.message


def test_the_head_alone_is_no_choice_where_it_is_the_embedding(tmp_path):
    pair = write(tmp_path)
    with pytest.raises(AlignmentError, match="its embedding, stored under both names") as caught:
        opened("linear", [pair.reasoner], pair.mllm, "head").plan()
    assert "embed covers a head" in caught.value.remedy


def test_a_head_that_differs_is_merged_for_itself_though_the_config_ties_it(tmp_path):
    own = random((c.VOCABULARY, c.HIDDEN), 7)
    pair = write(
        tmp_path,
        mllm={HEAD: own},
        reasoner={HEAD: random((c.VOCABULARY, c.HIDDEN), 8)},
        our_config={"tie_word_embeddings": False},
    )
    made = merge("linear", [pair.reasoner], pair.mllm, tmp_path / "out", weights=(0.3,))
    found, other = c.read_tensors(tmp_path / "out"), c.read_tensors(pair.reasoner)
    for name, mine in ((EMBED, c.read_tensors(pair.mllm)[EMBED]), (HEAD, own)):
        expected = 0.7 * mine.values.astype(np.float64) + 0.3 * other[name].values
        np.testing.assert_allclose(found[name].values, expected, rtol=1e-5, atol=1e-6)
    assert "second_names" not in made.manifest
    assert "tied_apart" in {f["code"] for f in made.manifest["findings"]}


def test_a_reasoner_that_stores_its_tied_head_twice_needs_no_partner_for_it(tmp_path):
    theirs = c.reasoner_tensors(dtype="F32")
    pair = write(tmp_path, reasoner={HEAD: theirs[EMBED]}, our_config={"tie_word_embeddings": None})
    merge("linear", [pair.reasoner], pair.mllm, tmp_path / "out", weights=(0.3,))
    found = c.read_tensors(tmp_path / "out")
    assert found[HEAD].data == found[EMBED].data


def test_tensors_of_one_value_are_no_copies(tmp_path):
    zero = c.store(np.zeros((c.INTERMEDIATE, c.HIDDEN)), "F32")
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    pair = write(tmp_path, mllm=dict.fromkeys(names, zero))
    found = find_copies(open_checkpoint(str(pair.mllm)))
    assert (found[EMBED], found[HEAD]) == (HEAD, HEAD)
    assert not found.keys() & set(names)


def test_one_element_makes_the_difference(tmp_path):
    values = c.mllm_tensors(dtype="F32")[EMBED].values.copy()
    values[-1, -1] += 1e-3
    pair = write(tmp_path, mllm={HEAD: c.store(values, "F32")})
    assert not find_copies(open_checkpoint(str(pair.mllm))).keys() & {EMBED, HEAD}


def test_a_prior_has_one_delta_and_applying_it_changes_both_names(tmp_path):
    pair = write(tmp_path)
    prior = run_prior(pair.reasoner, pair.mllm, tmp_path / "p", modules="full", dtype="float32")
    assert "lm_head.weight" not in prior.prior.tensors
    assert prior.prior.manifest["second_names"] == {EMBED: [HEAD]}
    run_apply(tmp_path / "p", pair.mllm, tmp_path / "out", scale=0.3)
    found, theirs = c.read_tensors(tmp_path / "out"), c.read_tensors(pair.reasoner)
    mine = c.read_tensors(pair.mllm)[EMBED].values.astype(np.float64)
    expected = 0.7 * mine + 0.3 * theirs[EMBED].values
    np.testing.assert_allclose(found[EMBED].values, expected, rtol=1e-5, atol=1e-6)
    assert found[HEAD].data == found[EMBED].data


def test_verify_computes_second_names_again_and_refuses_two_results(tmp_path):
    pair = write(tmp_path)
    merge("linear", [pair.reasoner], pair.mllm, tmp_path / "out", "embed", weights=(0.3,))
    made = open_merge(tmp_path / "out")
    report = verify_merge(made, reasoners=[str(pair.reasoner)], mllm=str(pair.mllm), sample=10**6)
    assert {EMBED, HEAD} <= set(report.recomputed)
    made.manifest["tensors"][HEAD]["fingerprint"] = made.tensors["model.norm.weight"]["fingerprint"]
    from drift_merge.storage.manifests import seal

    del made.manifest["seal"]
    made.manifest.update(seal(made.manifest))
    with pytest.raises(VerificationError, match=f"{HEAD} is a second name of {EMBED}"):
        verify_merge(made)


def test_without_data_the_config_decides_and_a_wrong_one_is_found_before_publishing(
    tmp_path, monkeypatch
):
    """As with --stream: headers alone are at hand when the plan is made."""
    monkeypatch.setattr(preparing, "find_copies", lambda *_, **__: None)
    pair = write(tmp_path / "right")
    made = merge("linear", [pair.reasoner], pair.mllm, tmp_path / "out", weights=(0.3,))
    assert made.manifest["second_names"] == {EMBED: [HEAD]}
    found = c.read_tensors(tmp_path / "out")
    assert found[HEAD].data == found[EMBED].data
    recipe = Recipe(method="linear", reasoners=(str(pair.reasoner),), mllm=str(pair.mllm))
    (said,) = [f for f in preparing.prepare(recipe).findings if f.code == "second_names"]
    assert "no data was compared" in said.message
    # The manifest is the same however the sources are read; it has `second_names` itself.
    assert "second_names" not in {finding["code"] for finding in made.manifest["findings"]}
    pair = write(tmp_path / "wrong", mllm={HEAD: random((c.VOCABULARY, c.HIDDEN), 7)})
    with pytest.raises(AlignmentError, match=f"ties {HEAD} to {EMBED}") as caught:
        merge("linear", [pair.reasoner], pair.mllm, tmp_path / "no", weights=(0.3,))
    assert "without --stream" in caught.value.remedy
    assert not (tmp_path / "no").exists()

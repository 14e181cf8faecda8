"""One parameter under two stored names: one result, written under every name."""

import json
import shutil

import numpy as np
import pytest

from drift_merge.engine.job import RunOptions
from drift_merge.errors import AlignmentError, VerificationError
from drift_merge.merges.make import make_merge
from drift_merge.merges.manifest import open_merge
from drift_merge.merges.verify import verify_merge
from drift_merge.plans import prepare as preparing
from drift_merge.plans.copies import find_copies
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe
from drift_merge.storage.checkpoint import open_checkpoint
from tests import checkpoints as c
from tests.runs import run_apply, run_prior

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = {"tokenizer.json": c.tokenizer()}


def random(shape, seed):
    return c.store(np.random.default_rng(seed).normal(size=shape), "F32")


def opened(method, reasoners, mllm, modules, **recipe):
    request = Recipe(
        method=method,
        reasoners=tuple(map(str, reasoners)),
        mllm=str(mllm),
        modules=modules,
        **recipe,
    )
    return prepare(request, quiet=True)


def merge(method, reasoners, mllm, out, modules="full", **recipe):
    prepared = opened(method, reasoners, mllm, modules, **recipe)
    return make_merge(prepared, prepared.plan(), out, RunOptions(threads=1)).merge


def write(tmp_path, *, reasoner=None, mllm=None, tied=True, our_config=None):
    own = c.mllm_tensors(dtype="F32")
    return c.make_pair(
        tmp_path,
        dtype="F32",
        reasoner={HEAD: None} | (reasoner or {}),
        mllm={HEAD: own[EMBED]} | (mllm or {}),
        reasoner_config={"tie_word_embeddings": True} | (our_config or {}),
        mllm_config_changes={} if tied is None else {"tie_word_embeddings": tied},
        reasoner_sidecars=TOKENS,
        mllm_sidecars=TOKENS,
    )


RECIPES = {
    "linear": {"weights": (0.3,)},
    "slerp": {"weights": (0.3,)},
    "dare-linear": {"options": {"density": 0.5}},
    "della": {"options": {"density": 0.5}},
    "ties": {"options": {"trim": "global"}},
}


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


class TestBlocks:
    """Blocks of layers that are stored under two names."""

    def test_a_whole_tower_that_is_stored_twice_is_one(self, tmp_path):
        own = c.mllm_tensors(dtype="F32")
        twin = {f"language_model.{n}": t for n, t in own.items() if n.startswith("model.")}
        pair = write(tmp_path, mllm=twin)
        alignment = opened("linear", [pair.reasoner], pair.mllm, "full").reasoners[0][1]
        once = 2 + 12 * 2  # embedding, final norm, two layers
        assert (alignment.num_selected, alignment.num_matched) == (once, once)
        merge("linear", [pair.reasoner], pair.mllm, tmp_path / "out", weights=(0.3,))
        found, theirs = c.read_tensors(tmp_path / "out"), c.read_tensors(pair.reasoner)
        for name, tensor in own.items():
            if not name.startswith("model."):
                continue
            expected = 0.7 * tensor.values.astype(np.float64) + 0.3 * theirs[name].values
            np.testing.assert_allclose(found[name].values, expected, rtol=1e-5, atol=1e-6)
            assert found[name].data == found[f"language_model.{name}"].data
            assert found[name].data != tensor.data

    def test_a_vocabulary_of_a_layer_that_is_the_embedding_follows_it(self, tmp_path):
        own = c.mllm_tensors(dtype="F32")
        again = "model.layers.1.embed_tokens.weight"
        pair = write(tmp_path, mllm={again: own[EMBED]}, reasoner={again: random((40, 16), 5)})
        # The reasoner's is a parameter of its own, which has no partner then.
        merge(
            "linear",
            [pair.reasoner],
            pair.mllm,
            tmp_path / "out",
            weights=(0.3,),
            on_mismatch="skip",
        )
        found = c.read_tensors(tmp_path / "out")
        assert found[again].data == found[EMBED].data == found[HEAD].data

    def shared(self, tmp_path, *, reasoner_shares):
        """Layer 1's mlp is layer 0's in the mllm."""
        names = [f"model.layers.{{}}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        mine, theirs = c.mllm_tensors(dtype="F32"), c.reasoner_tensors(dtype="F32")
        copied = {name.format(1): mine[name.format(0)] for name in names}
        changes = {name.format(1): theirs[name.format(0)] for name in names}
        pair = write(tmp_path, mllm=copied, reasoner=changes if reasoner_shares else {})
        return pair, names[1].format(0), names[1].format(1)

    @pytest.mark.parametrize("method", ["linear", "dare-linear", "della"])
    def test_a_block_that_both_models_share_has_one_result(self, tmp_path, method):
        pair, first, second = self.shared(tmp_path, reasoner_shares=True)
        recipe = dict(RECIPES[method])
        if method != "linear":
            tensors = c.read_tensors(pair.reasoner)
            tensors = {n: random(t.shape, i) for i, (n, t) in enumerate(tensors.items())}
            for name in [n for n in tensors if ".layers.1.mlp." in n]:
                tensors[name] = tensors[name.replace(".1.", ".0.")]
            config = json.loads((pair.reasoner / "config.json").read_text())
            c.write_checkpoint(tmp_path / "base", tensors, config, sidecars=TOKENS)
            recipe["base"] = str(tmp_path / "base")
        merge(method, [pair.reasoner], pair.mllm, tmp_path / "out", "mlp", **recipe)
        found = c.read_tensors(tmp_path / "out")
        assert found[first].data == found[second].data != c.read_tensors(pair.mllm)[first].data

    def test_a_block_that_the_reasoner_stores_once_has_second_names(self, tmp_path):
        pair, first, second = self.shared(tmp_path, reasoner_shares=True)
        tensors = c.read_tensors(pair.reasoner)
        kept = {n: t for n, t in tensors.items() if ".layers.1.mlp." not in n}
        c.write_shard(pair.reasoner / "model.safetensors", kept)
        made = merge("linear", [pair.reasoner], pair.mllm, tmp_path / "out", "mlp", weights=(0.3,))
        assert made.manifest["second_names"][first] == [second]
        found = c.read_tensors(tmp_path / "out")
        assert found[first].data == found[second].data != c.read_tensors(pair.mllm)[first].data

    def test_a_layer_that_the_reasoner_lacks_is_no_second_name(self, tmp_path):
        own = c.mllm_tensors(dtype="F32")
        copied = {n.replace(".0.", ".1."): t for n, t in own.items() if ".layers.0." in n}
        copied = {n: t for n, t in copied.items() if n.startswith("model.layers.1.")}
        lacking = {n: None for n in c.reasoner_tensors(dtype="F32") if ".layers.1." in n}
        pair = write(tmp_path, mllm=copied, reasoner=lacking)
        with pytest.raises(AlignmentError, match="have no partner"):
            opened("linear", [pair.reasoner], pair.mllm, "mlp").plan()

    def test_a_copy_whose_partner_is_none_is_merged_with_its_own_and_counted(self, tmp_path):
        """As experts that were copied from one when the mllm was made."""
        pair, first, second = self.shared(tmp_path, reasoner_shares=False)
        prepared = opened("linear", [pair.reasoner], pair.mllm, "mlp", weights=(0.3,))
        (said,) = [f for f in prepared.findings if f.code == "copies_apart"]
        assert said.message.startswith("3 tensors of the mllm")
        merge("linear", [pair.reasoner], pair.mllm, tmp_path / "out", "mlp", weights=(0.3,))
        found, mine, theirs = map(c.read_tensors, (tmp_path / "out", pair.mllm, pair.reasoner))
        for name in (first, second):
            expected = 0.7 * mine[name].values.astype(np.float64) + 0.3 * theirs[name].values
            np.testing.assert_allclose(found[name].values, expected, rtol=1e-5, atol=1e-6)

    def test_what_is_two_to_one_reasoner_is_two_to_all(self, tmp_path):
        again = "model.layers.1.mlp.up_proj.weight"
        pair, first, second = self.shared(tmp_path, reasoner_shares=False)
        assert second == again
        other = tmp_path / "other"
        shutil.copytree(pair.reasoner, other)
        tensors = c.read_tensors(other)
        for name in [n for n in tensors if ".layers.1.mlp." in n]:
            del tensors[name]  # saved once, as for a block that is shared
        c.write_shard(other / "model.safetensors", tensors)
        prepared = opened(
            "linear",
            [pair.reasoner, other],
            pair.mllm,
            "mlp",
            weights=(0.2, 0.2),
            on_mismatch="skip",
        )
        assert [a.second_names.get(first) for _, a in prepared.reasoners] == [None, None]


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

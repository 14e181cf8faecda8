"""Blocks that a checkpoint stores twice."""

import json
import shutil

import numpy as np
import pytest

from drift_merge.errors import AlignmentError
from tests import checkpoints as c
from tests.plans.second_names import EMBED, HEAD, RECIPES, TOKENS, merge, opened, random, write


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

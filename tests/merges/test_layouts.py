"""Methods that look at whole tensors, over fused, split and transposed ones; rows by token."""

import numpy as np
import pytest

from drift_merge.engine import workspace
from drift_merge.storage.fingerprints import key_of
from tests import checkpoints as c
from tests.engine.layouts import VISION, logical, stored, write
from tests.merges.suite import (
    CASES,
    Case,
    Sources,
    merged_tensor,
    name_of,
    run_merge,
)
from tests.names import families

VIEWED = ("slerp", "nuslerp", "ties", "dare-ties", "della", "arcee-fusion", "breadcrumbs", "sce")


VIEW_CASES = [c for c in CASES if c.name in VIEWED and c.variant == "paper"]


LAYOUTS = [("split", "fused"), ("fused", "split"), ("experts", "experts_transposed")]


@pytest.mark.parametrize("case", VIEW_CASES, ids=name_of)
@pytest.mark.parametrize(("ours", "theirs"), LAYOUTS)
def test_fused_split_and_transposed_views_are_merged_in_the_layout_of_the_mllm(
    case, ours, theirs, tmp_path, monkeypatch
):
    monkeypatch.setattr(workspace, "CPU_CHUNK", 50)
    tails = families.experts() if "experts" in ours else families.layer(bias=False)
    models = {name: logical(seed, tails) for seed, name in enumerate(("one", "two", "base"))}
    own, vision = logical(5, tails), c.random_tensors(VISION, 4)
    paths = {name: write(tmp_path, name, stored(model, ours)) for name, model in models.items()}
    mllm = write(tmp_path, "mllm", stored(own, theirs) | vision)
    sources = Sources((paths["one"], paths["two"]), mllm, paths["base"])
    made = run_merge(case, sources, tmp_path / "out", modules="attn,mlp")
    seen = {name: stored(model, theirs) for name, model in models.items()}
    found, num_merged = c.read_tensors(tmp_path / "out"), 0
    for name, tensor in (stored(own, theirs) | vision).items():
        entry = made.merge.tensors[name]
        expected = tensor
        if entry["method"] == case.name:
            num_merged += 1
            inputs = [seen[role][name] for role in ("one", "two")[: case.num_reasoners]]
            base = seen["base"][name] if case.has_base else None
            key = key_of(0, case.name, entry["canonical"])
            expected = merged_tensor(case, [tensor, *inputs, base], key)
        assert found[name] == expected, name
    assert num_merged == sum(".layers." in name and "norm" not in name for name in found)


WORDS = {  # row i of an embedding belongs to word i
    "mllm": ("b", "new", "a", "image", "d", "f"),
    "one": ("f", "a", "b", "c", "e", "new"),  # lacks d
    "base": ("a", "b", "c", "d", "e"),  # lacks f and new
}


@pytest.mark.parametrize("name", ["chat-vector", "task-arithmetic", "inject"])
def test_a_row_of_a_token_that_reasoner_or_base_lacks_stays_the_mllms(name, tmp_path):
    tensors, paths = {}, {}
    tails = families.layer(bias=False)
    for seed, (role, words) in enumerate(WORDS.items(), start=1):
        shapes = families.decoder(tails=tails, layers=1, vocab=len(words))
        shapes |= VISION if role == "mllm" else {}
        tensors[role] = c.random_tensors(shapes, seed, dtype="F32")
        files = {"tokenizer.json": c.tokenizer(list(words))}
        config = {"num_hidden_layers": 1}
        paths[role] = c.write_checkpoint(tmp_path / role, tensors[role], config, sidecars=files)
    sources = Sources((paths["one"],), paths["mllm"], paths["base"])
    case = Case(name, "paper", has_base=True)
    run_merge(case, sources, tmp_path / "out", modules="embed", options={"scale": 1.0})
    key = "model.embed_tokens.weight"
    own, reasoner, base = (tensors[role][key].values for role in WORDS)
    found = c.read_tensors(tmp_path / "out")[key].values
    for index, word in enumerate(WORDS["mllm"]):
        expected = own[index]
        if word in "ab":
            other, origin = (WORDS[role].index(word) for role in ("one", "base"))
            expected = expected + (reasoner[other] - base[origin])
        np.testing.assert_allclose(found[index], expected, atol=1e-7, err_msg=word)

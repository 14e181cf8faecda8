"""Whole runs over tensors with a row per token, against a loop over tokens in numpy."""

import json
from typing import ClassVar

import numpy as np
import pytest

from drift_merge.engine.job import RunOptions
from drift_merge.merges.make import make_merge
from drift_merge.plans.prepare import prepare
from drift_merge.recipes.recipe import Recipe
from tests import checkpoints as c
from tests.runs import run_linear, run_prior

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = [f"w{i}" for i in range(36)]


def matrix(rows, seed, cols=c.HIDDEN):
    return c.store(np.random.default_rng(seed).normal(size=(rows, cols)), "F32")


def merge(method, reasoners, mllm, out, **recipe):
    values = {"modules": "embed,head"} | recipe
    listed = tuple(map(str, reasoners))
    request = Recipe(method=method, reasoners=listed, mllm=str(mllm), **values)
    prepared = prepare(request, quiet=True)
    return make_merge(prepared, prepared.plan(), out, RunOptions(threads=1))


def added(tokens, first):
    decoder = {str(first + i): {"content": token} for i, token in enumerate(tokens)}
    return {
        "added_tokens.json": json.dumps({t: first + i for i, t in enumerate(tokens)}).encode(),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": decoder}).encode(),
    }


def mixed(mllm, reasoner, theirs, ours, weight):
    """Row by row: the mean of equal tokens, the mllm's own row for all others."""
    expected = mllm.astype(np.float64).copy()
    for row, token in enumerate(theirs):
        if token is not None and token in ours:
            other = reasoner[ours.index(token)].astype(np.float64)
            expected[row] = (1 - weight) * mllm[row] + weight * other
    return expected


@pytest.fixture
def pair(tmp_path):
    """Equal tokenizer.json; what stands beyond it differs, and padding has no name at all."""
    base = {"tokenizer.json": c.tokenizer(WORDS)}
    return c.make_pair(
        tmp_path,
        dtype="F32",
        reasoner={EMBED: matrix(40, 1), HEAD: matrix(40, 2)},
        mllm={EMBED: matrix(44, 3), HEAD: matrix(44, 4)},
        reasoner_sidecars=base | added(["[PAD]", "<think>"], 36),
        mllm_sidecars=base | added(["<image>", "<box>", "<think>"], 36),
    )


OURS = [*WORDS, "[PAD]", "<think>"]
THEIRS = [*WORDS, "<image>", "<box>", "<think>", *[None] * 5]


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_rows_beyond_equal_tokenizers_are_paired_by_the_other_files(tmp_path, pair, name):
    made = run_linear(pair.reasoner, pair.mllm, tmp_path / "out", 0.4, modules="embed,head")
    mine, other = c.read_tensors(pair.mllm)[name].values, c.read_tensors(pair.reasoner)[name].values
    found = c.read_tensors(tmp_path / "out")[name].values
    np.testing.assert_allclose(found, mixed(mine, other, THEIRS, OURS, 0.4), rtol=1e-6, atol=1e-6)
    for row in (36, 37, *range(39, 44)):
        np.testing.assert_array_equal(found[row], mine[row])
    assert not np.array_equal(found[38], mine[38])
    entry = made.merge.tensors[name]
    assert (entry["rows_matched"], entry["rows_unmatched"], entry["rows_unexplained"]) == (
        [37],
        [7],
        5,
    )
    canonical = name.removeprefix("model.")
    found_of = [f["message"] for f in made.merge.manifest["findings"] if canonical in f["message"]]
    (said,) = [message for message in found_of if "rows" in message]
    assert "7 stay as the mllm has them (5 of these no tokenizer file explains)" in said


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("linear", {"weights": (0.3,)}),
        ("slerp", {"weights": (0.3,)}),
        ("nuslerp", {"weights": (0.3,)}),
        ("karcher", {}),
        ("passthrough", {"options": {"scale": 0.5}}),
        ("multislerp", {"weights": (0.3,)}),
    ],
)
def test_rows_that_nothing_explains_are_the_mllms_to_the_bit_by_every_method(
    tmp_path, pair, method, recipe
):
    merge(method, [pair.reasoner], pair.mllm, tmp_path / "out", **recipe)
    mine = c.read_tensors(pair.mllm)[EMBED].values
    found = c.read_tensors(tmp_path / "out")[EMBED].values
    kept = [36, 37, *range(39, 44)]
    assert found[kept].tobytes() == mine[kept].tobytes()
    assert not np.array_equal(found[:36], mine[:36])


def test_a_base_brings_no_change_to_rows_without_a_partner(tmp_path, pair):
    merge(
        "dare-linear",
        [pair.reasoner],
        pair.mllm,
        tmp_path / "out",
        base=str(pair.reasoner),
        options={"density": 0.5},
    )
    mine = c.read_tensors(pair.mllm)[EMBED].values
    found = c.read_tensors(tmp_path / "out")[EMBED].values
    kept = [36, 37, *range(39, 44)]
    assert found[kept].tobytes() == mine[kept].tobytes()


def test_padding_of_equal_vocabularies_is_not_merged(tmp_path):
    files = {"tokenizer.json": c.tokenizer(WORDS)}
    pair = c.make_pair(tmp_path, dtype="F32", reasoner_sidecars=files, mllm_sidecars=files)
    made = run_prior(pair.reasoner, pair.mllm, tmp_path / "out", modules="embed", dtype="float32")
    found = c.read_tensors(tmp_path / "out")["embed_tokens.weight"].values
    ours, theirs = (c.read_tensors(side)[EMBED].values for side in pair)
    np.testing.assert_array_equal(found[:36], (ours - theirs)[:36])
    assert not found[36:].any()
    entry = made.prior.tensors["embed_tokens.weight"]
    assert (entry["rows_matched"], entry["rows_unexplained"]) == (36, 4)


def test_equal_vocabularies_that_explain_every_row_need_no_gathering(tmp_path):
    files = {"tokenizer.json": c.tokenizer()}
    pair = c.make_pair(tmp_path, reasoner_sidecars=files, mllm_sidecars=files)
    request = Recipe(
        method="linear", reasoners=(str(pair.reasoner),), mllm=str(pair.mllm), modules="embed,head"
    )
    steps = {step.name: step for step in prepare(request, quiet=True).plan().steps}
    for name in (EMBED, HEAD):
        assert all(view.is_identity and view.rows is None for view in steps[name].inputs)


def test_vocabularies_inside_a_layer_follow_the_same_law(tmp_path):
    """A block of multi-token prediction has an embedding and a head of its own."""
    names = ("embed_tokens.weight", "shared_head.head.weight")
    ours = {f"model.layers.1.{n}": matrix(38, i) for i, n in enumerate(names)}
    theirs = {f"model.layers.1.{n}": matrix(39, 9 + i) for i, n in enumerate(names)}
    base = c.tokenizer(WORDS)
    pair = c.make_pair(
        tmp_path,
        dtype="F32",
        reasoner=ours | {EMBED: matrix(38, 5), HEAD: matrix(38, 6)},
        mllm=theirs | {EMBED: matrix(39, 7), HEAD: matrix(39, 8)},
        reasoner_sidecars={"tokenizer.json": base, **added(["[PAD]", "<think>"], 36)},
        mllm_sidecars={"tokenizer.json": base, **added(["<image>", "<box>", "<think>"], 36)},
    )
    run_linear(pair.reasoner, pair.mllm, tmp_path / "out", 0.4, modules="full")
    found = c.read_tensors(tmp_path / "out")
    for name in ours:
        expected = mixed(theirs[name].values, ours[name].values, THEIRS[:39], OURS, 0.4)
        np.testing.assert_allclose(found[name].values, expected, rtol=1e-6, atol=1e-6)


PIECES = {
    "molmo": ("model.embed_tokens.embedding", "model.embed_tokens.new_embedding"),
    "idefics": ("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight"),
}


class TestPieces:
    """One vocabulary in two tensors: ids continue over them."""

    words: ClassVar = [f"t{i}" for i in range(30)]

    def side(self, names, sizes, seed):
        found = {EMBED: None}
        parts = {
            name: matrix(rows, seed + i)
            for i, (name, rows) in enumerate(zip(names, sizes, strict=True))
        }
        return found | parts, np.concatenate([part.values for part in parts.values()])

    def check(self, tmp_path, ours, theirs, our_words, their_words, names):
        pair = c.make_pair(
            tmp_path,
            dtype="F32",
            reasoner=ours[0],
            mllm=theirs[0],
            reasoner_sidecars={"tokenizer.json": c.tokenizer(our_words)},
            mllm_sidecars={"tokenizer.json": c.tokenizer(their_words)},
        )
        run_linear(pair.reasoner, pair.mllm, tmp_path / "out", 0.4, modules="embed")
        tensors = c.read_tensors(tmp_path / "out")
        found = np.concatenate([tensors[name].values for name in names])
        padded = [*their_words, *[None] * (len(theirs[1]) - len(their_words))]
        expected = mixed(theirs[1], ours[1], padded, our_words, 0.4)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        return pair

    @pytest.mark.parametrize("family", PIECES)
    def test_of_the_mllm_against_one_whole_table(self, tmp_path, family):
        names = PIECES[family]
        our_words = [*reversed(self.words), "<only>"]
        theirs = self.side(names, (24, 9), 3)
        ours = self.side([EMBED], [31], 1)
        self.check(tmp_path, ours, theirs, our_words, [*self.words, "<image>"], names)

    def test_of_the_reasoner_against_one_whole_table(self, tmp_path):
        ours = self.side(PIECES["molmo"], (11, 19), 1)
        words = self.words[5:] + self.words[:5]
        self.check(tmp_path, ours, self.side([EMBED], [33], 3), words, self.words, [EMBED])

    @pytest.mark.parametrize("chunk", [1, 40, 2**17])
    def test_of_both_sides_cut_elsewhere(self, tmp_path, monkeypatch, chunk):
        from drift_merge.engine import workspace

        monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
        names = PIECES["molmo"]
        ours, theirs = self.side(names, (20, 10), 1), self.side(names, (12, 20), 3)
        self.check(tmp_path, ours, theirs, self.words, self.words, names)

    def test_a_prior_of_pieces_applies_to_them(self, tmp_path):
        from tests.runs import run_apply

        names = PIECES["idefics"]
        ours, theirs = self.side([EMBED], [30], 1), self.side(names, (24, 9), 3)
        pair = self.check(tmp_path, ours, theirs, self.words, self.words, names)
        run_prior(pair.reasoner, pair.mllm, tmp_path / "p", modules="embed,norm", dtype="float32")
        run_apply(tmp_path / "p", pair.mllm, tmp_path / "applied", scale=0.4)
        merged, applied = (c.read_tensors(tmp_path / name) for name in ("out", "applied"))
        for name in names:
            np.testing.assert_allclose(
                applied[name].values, merged[name].values, rtol=1e-5, atol=1e-6
            )

    def test_without_a_known_order_they_are_refused(self, tmp_path):
        from drift_merge.errors import AlignmentError

        names = ("model.embed_tokens.left_embedding", "model.embed_tokens.right_embedding")
        with pytest.raises(AlignmentError, match="in which order"):
            self.check(
                tmp_path,
                self.side([EMBED], [30], 1),
                self.side(names, (20, 10), 3),
                self.words,
                self.words,
                names,
            )

"""Every kind of view through real files: fused, split, transposed, inserted, matched by token.

Two logical models are stored in two layouts; what is streamed must equal, bit for bit, what is
computed on the logical models in memory and then stored in the layout of the mllm.
"""

import re

import numpy as np
import pytest

from drift_merge.engine import workspace
from tests import checkpoints as c
from tests.engine.layouts import CONFIG, VISION, logical, stored, write
from tests.names import families as f
from tests.runs import in_memory_delta, in_memory_linear, run_linear, run_prior

SELECTED = re.compile(r"(^|\.)layers\.\d+\.(?!.*norm)|(^|\.)layers\.\d+\.attention\.")


def combine(one, other, function):
    """Apply a function of stored tensors to two logical models."""
    return {n: function(c.store(one[n]), c.store(other[n])).values for n in one}


DENSE = [("split", "fused"), ("fused", "split"), ("split", "internlm"), ("internlm", "split")]
SPARSE = [
    (a, b)
    for a in ("split", "experts", "experts_transposed")
    for b in ("split", "experts", "experts_transposed")
]


@pytest.mark.parametrize("chunk", [11, 2**17])
@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [(*p, "dense") for p in DENSE]
    + [("fused", "split", "bias"), ("split", "fused", "bias")]
    + [(*p, "moe") for p in SPARSE],
)
def test_layouts_meet_in_every_direction(tmp_path, monkeypatch, chunk, ours, theirs, kind):
    monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
    tails = {"dense": f.layer(bias=False), "bias": f.layer(), "moe": f.experts()}[kind]
    reasoner, mllm, base = (logical(seed, tails) for seed in (1, 2, 3))
    vision = c.random_tensors(VISION, 4)
    paths = [
        write(tmp_path, "reasoner", stored(reasoner, ours)),
        write(tmp_path, "mllm", stored(mllm, theirs) | vision),
    ]

    run_linear(*paths, tmp_path / "merge", 0.3, modules="attn,mlp")
    merged = combine(mllm, reasoner, lambda m, r: in_memory_linear(m, [r], [0.3]))
    everything = stored(merged, theirs) | vision
    untouched = stored(mllm, theirs) | vision
    expected = {n: t if SELECTED.search(n) else untouched[n] for n, t in everything.items()}
    assert c.read_tensors(tmp_path / "merge") == dict(sorted(expected.items()))

    run_prior(*paths, tmp_path / "prior")
    step = stored(combine(reasoner, mllm, in_memory_delta), theirs)
    assert_same_deltas(tmp_path / "prior", step)

    ancestor = write(tmp_path, "base", stored(base, theirs))
    run_prior(*paths, tmp_path / "based", base=ancestor)
    step = stored(combine(reasoner, base, in_memory_delta), theirs)
    assert_same_deltas(tmp_path / "based", step)


def assert_same_deltas(directory, step):
    """Names may be canonical or the mllm's own: the values of the selected tensors must agree."""
    found = list(c.read_tensors(directory).values())
    wanted = [t for n, t in step.items() if SELECTED.search(n)]

    def key(tensor):
        return tensor.shape, tensor.data

    assert wanted
    assert sorted(found, key=key) == sorted(wanted, key=key)


def test_parts_of_different_dtypes_are_not_cast_to_the_first_one(tmp_path):
    reasoner, mllm = (logical(seed, f.layer(bias=False)) for seed in (1, 2))
    precise = {n: v + np.float32(1e-4) * v for n, v in reasoner.items()}
    ours = {
        n: c.store(v, "F32") if "k_proj" in n or "up_proj" in n else c.store(v)
        for n, v in precise.items()
    }
    theirs = stored(mllm, "fused") | c.random_tensors(VISION, 4)
    run_prior(
        write(tmp_path, "r", ours), write(tmp_path, "m", theirs), tmp_path / "out", dtype="float32"
    )
    found = c.read_tensors(tmp_path / "out")
    rows = slice(f.HEADS * f.DIM, f.HEADS * f.DIM + f.KV * f.DIM)
    for layer in range(3):
        fused = found[f"layers.{layer}.self_attn.qkv_proj.weight"].values[rows]
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        expected = in_memory_delta(ours[name], c.store(mllm[name]), "F32").values
        np.testing.assert_array_equal(fused, expected)


def test_inserted_cross_attention_layers_stay_and_the_others_shift(tmp_path):
    reasoner = c.random_tensors(f.decoder(layers=3), 1)
    plain = c.random_tensors(
        f.decoder("language_model.model.", "language_model.lm_head.", layers=3), 2
    )
    inserted, mllm = 1, {}
    for name, tensor in plain.items():
        number = re.search(r"layers\.(\d+)\.", name)
        if number and int(number[1]) >= inserted:
            name = name.replace(number[0], f"layers.{int(number[1]) + 1}.")
        mllm[name] = tensor
    at = f"language_model.model.layers.{inserted}."
    cross = {
        at + "cross_attn.q_proj.weight": (f.H, f.H),
        at + "cross_attn.k_proj.weight": (f.H, f.H),
        at + "mlp.gate_proj.weight": (f.WIDTH, f.H),
        at + "mlp.up_proj.weight": (f.WIDTH, f.H),
        at + "mlp.down_proj.weight": (f.H, f.WIDTH),
        at + "input_layernorm.weight": (f.H,),
        at + "cross_attn_attn_gate": (1,),
    }
    vision = c.random_tensors(f.VISION, 3)
    mllm |= c.random_tensors(cross, 4) | vision
    config = {"text_config": CONFIG | {"num_hidden_layers": 4, "cross_attention_layers": [1]}}
    paths = write(tmp_path, "r", reasoner), write(tmp_path, "m", mllm, config)
    run_linear(*paths, tmp_path / "out", 0.5)
    found = c.read_tensors(tmp_path / "out")
    for name in [*cross, *vision]:
        assert found[name] == mllm[name], name
    for stored_layer, text_layer in ((0, 0), (2, 1), (3, 2)):
        name = f"language_model.model.layers.{stored_layer}.mlp.up_proj.weight"
        ours = reasoner[f"model.layers.{text_layer}.mlp.up_proj.weight"]
        assert found[name] == in_memory_linear(mllm[name], [ours], [0.5])


class TestRowsMatchedByToken:
    """Three models whose tokenizers share some words, in other rows."""

    words = ("a", "b", "c", "d", "e", "f")
    theirs = ("b", "new", "a", "image", "d", "f")  # the mllm's row i
    ours = ("f", "a", "b", "c", "d", "e")  # the reasoner's row i
    ancestors = ("a", "b", "c", "d", "e")  # the base lacks f

    def write(self, directory, *, tied=False):
        def one(name, seed, words, extra):
            tails = f.layer(bias=False)
            shapes = f.decoder(
                tails=tails, layers=1, vocab=len(words), head=None if tied else "lm_head."
            )
            tensors = c.random_tensors(shapes | extra, seed)
            files = {"tokenizer.json": c.tokenizer(list(words))}
            config = {"num_hidden_layers": 1, "tie_word_embeddings": tied}
            return c.write_checkpoint(directory / name, tensors, config, sidecars=files)

        return (
            one("reasoner", 1, self.ours, {}),
            one("mllm", 2, self.theirs, VISION),
            one("base", 3, self.ancestors, {}),
        )

    def rows(self, mine, theirs, name):
        """Per row of the mllm: the partner's row as a stored tensor, or None."""
        tensors = c.read_tensors(mine)
        return [
            c.store(tensors[name].values[theirs.index(word)]) if word in theirs else None
            for word in self.theirs
        ]

    @pytest.mark.parametrize("chunk", [1, 20, 2**17])
    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
    def test_a_merge_mixes_rows_of_equal_tokens_and_keeps_the_others(
        self, tmp_path, monkeypatch, chunk, name
    ):
        monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
        reasoner, mllm, _ = self.write(tmp_path)
        made = run_linear(reasoner, mllm, tmp_path / "out", 0.4, modules="embed,head")
        own = c.read_tensors(mllm)[name].values
        found = c.read_tensors(tmp_path / "out")[name].values
        for index, partner in enumerate(self.rows(reasoner, self.ours, name)):
            mine = c.store(own[index])
            expected = in_memory_linear(mine, [partner], [0.4]) if partner else mine
            np.testing.assert_array_equal(found[index], expected.values)
        assert made.merge.tensors[name]["method"] == "linear"

    @pytest.mark.parametrize("chunk", [1, 20, 2**17])
    def test_a_prior_is_zero_in_rows_without_a_partner(self, tmp_path, monkeypatch, chunk):
        monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
        reasoner, mllm, _ = self.write(tmp_path)
        made = run_prior(reasoner, mllm, tmp_path / "out", modules="embed,head,attn")
        own = c.read_tensors(mllm)["model.embed_tokens.weight"].values
        found = c.read_tensors(tmp_path / "out")["embed_tokens.weight"].values
        partners = self.rows(reasoner, self.ours, "model.embed_tokens.weight")
        for index, partner in enumerate(partners):
            if partner is None:
                assert not found[index].any()
            else:
                expected = in_memory_delta(partner, c.store(own[index]))
                np.testing.assert_array_equal(found[index], expected.values)
        entry = made.prior.tensors["embed_tokens.weight"]
        assert (entry["rows_matched"], entry["rows_unmatched"]) == (4, 2)

    @pytest.mark.parametrize("chunk", [1, 2**17])
    def test_a_row_that_the_base_lacks_has_delta_zero(self, tmp_path, monkeypatch, chunk):
        monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
        reasoner, mllm, base = self.write(tmp_path)
        made = run_prior(reasoner, mllm, tmp_path / "out", modules="embed,head,attn", base=base)
        for canonical in ("embed_tokens.weight", "lm_head.weight"):
            name = canonical if "lm_head" in canonical else f"model.{canonical}"
            found = c.read_tensors(tmp_path / "out")[canonical].values
            ours = self.rows(reasoner, self.ours, name)
            origins = self.rows(base, self.ancestors, name)
            for index, (one, origin) in enumerate(zip(ours, origins, strict=True)):
                if one is None or origin is None:
                    assert not found[index].any(), self.theirs[index]
                else:
                    expected = in_memory_delta(one, origin)
                    np.testing.assert_array_equal(found[index], expected.values)
        entry = made.prior.tensors["embed_tokens.weight"]
        assert (entry["rows_matched"], entry["rows_unmatched"]) == (3, 3)

    def test_two_reasoners_of_other_vocabularies_each_bring_their_rows(self, tmp_path):
        reasoner, mllm, other = self.write(tmp_path)
        run_linear([reasoner, other], mllm, tmp_path / "out", 0.4, 0.2, modules="embed")
        name = "model.embed_tokens.weight"
        own = c.read_tensors(mllm)[name].values
        found = c.read_tensors(tmp_path / "out")[name].values
        rows = zip(
            self.rows(reasoner, self.ours, name),
            self.rows(other, self.ancestors, name),
            strict=True,
        )
        for index, partners in enumerate(rows):
            mine = c.store(own[index])
            present = [partner or mine for partner in partners]
            expected = in_memory_linear(mine, present, [0.4, 0.2])
            np.testing.assert_array_equal(found[index], expected.values)

    def test_a_tied_mllm_stays_tied(self, tmp_path):
        reasoner, mllm, _ = self.write(tmp_path, tied=True)
        run_linear(reasoner, mllm, tmp_path / "out", 0.4, modules="full")
        assert list(c.read_tensors(tmp_path / "out")) == list(c.read_tensors(mllm))
        assert "lm_head.weight" not in c.read_tensors(tmp_path / "out")
        assert (tmp_path / "out/config.json").read_bytes() == (mllm / "config.json").read_bytes()

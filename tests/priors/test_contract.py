"""The prior on disk: what its files promise, and that every promised figure is true."""

import json
from math import prod

import numpy as np
import pytest
from safetensors import safe_open

from drift_merge.errors import CheckpointError, SourceError
from drift_merge.priors.manifest import open_prior
from drift_merge.storage import fingerprints
from drift_merge.storage.checkpoint import open_checkpoint
from tests import checkpoints as c
from tests import reference
from tests.golden_files import compare_with_golden
from tests.priors.exact import exact_tensors
from tests.runs import run_prior

FILES = {"README.md", "prior.json", "prior.safetensors.index.json"}


@pytest.fixture
def fixed(tmp_path, monkeypatch):
    """A pair whose every byte is written down here; the current directory holds it."""
    shapes = c.text_shapes(1)
    words = [f"word{i}" for i in range(c.VOCABULARY)]
    ours, theirs = c.tokenizer(words), c.tokenizer([*words[:-1], "image"])
    c.write_checkpoint(
        tmp_path / "reasoner",
        exact_tensors(shapes, 5),
        c.text_config(1, rope_theta=10000.0),
        sidecars={"tokenizer.json": ours},
    )
    c.write_checkpoint(
        tmp_path / "mllm",
        exact_tensors(shapes | c.vision_shapes(), 7),
        c.mllm_config(1),
        num_shards=2,
        sidecars={"tokenizer.json": theirs},
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_manifest_of_a_fixed_pair_is_the_golden_one(fixed):
    run_prior("reasoner", "mllm", fixed / "out", modules="full", max_shard_size="2KB")
    manifest = json.loads((fixed / "out/prior.json").read_text())
    assert manifest["tool"].pop("version")
    assert manifest.pop("seal").startswith("xxh3:")  # covers the version too
    compare_with_golden("prior.json", json.dumps(manifest, indent=1) + "\n")


def test_the_manifest_of_a_fixed_pair_with_a_base_is_the_golden_one(fixed):
    base = c.write_checkpoint(fixed / "base", exact_tensors(c.text_shapes(1), 11), c.text_config(1))
    run_prior("reasoner", "mllm", fixed / "out", base=base.name, dtype="float32", layers="0")
    manifest = json.loads((fixed / "out/prior.json").read_text())
    assert manifest["tool"].pop("version")
    assert manifest.pop("seal")
    compare_with_golden("prior_with_base.json", json.dumps(manifest, indent=1) + "\n")


def test_a_prior_does_not_look_like_a_model(tmp_path):
    pair = c.make_pair(tmp_path, mllm_sidecars=c.SIDECARS)
    for size, shards in (("5GB", 1), ("2KB", None)):
        out = tmp_path / size
        made = run_prior(*pair, out, max_shard_size=size)
        names = {path.name for path in out.iterdir()}
        written = {name for name in names if name.endswith(".safetensors")}
        assert names == FILES | written
        count = shards or len(written)
        assert written == {f"prior-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
        assert sorted(written) == made.prior.manifest["shards"]
        with pytest.raises(CheckpointError, match="prior"):
            open_checkpoint(str(out))
        assert "not a model" in (out / "README.md").read_text()


def test_shards_and_index_say_what_they_are(tmp_path):
    pair = c.make_pair(tmp_path)
    out = tmp_path / "out"
    run_prior(*pair, out, max_shard_size="3KB")
    index = json.loads((out / "prior.safetensors.index.json").read_text())
    weight_map = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {
                "format": "pt",
                "kind": "drift-prior",
                "format_version": "1",
            }
            weight_map |= dict.fromkeys(shard.keys(), file.name)
    assert index["weight_map"] == weight_map
    stored = c.read_tensors(out)
    assert index["metadata"] == {"total_size": sum(len(t.data) for t in stored.values())}
    expected = {
        n.removeprefix("model.") for n in c.text_shapes(2) if "self_attn" in n or ".mlp." in n
    }
    assert set(weight_map) == expected


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "source"])
def test_every_figure_of_every_tensor_is_true(tmp_path, with_base, dtype):
    pair = c.make_pair(tmp_path)
    base = None
    if with_base:
        base = c.write_checkpoint(tmp_path / "base", c.reasoner_tensors(seed=9), c.text_config())
    made = run_prior(*pair, tmp_path / "out", base=base, dtype=dtype, modules="attn,mlp,norm")
    stored = c.read_tensors(tmp_path / "out")
    reasoner, mllm = c.read_tensors(pair.reasoner), c.read_tensors(pair.mllm)
    origins = c.read_tensors(base) if base else mllm
    assert list(made.prior.tensors) != []
    for name, entry in made.prior.tensors.items():
        ours, theirs, origin = (side[f"model.{name}"] for side in (reasoner, mllm, origins))
        assert entry["reasoner"] == [f"model.{name}"]
        assert entry["mllm"] == f"model.{name}"
        assert tuple(entry["shape"]) == stored[name].shape == theirs.shape
        assert entry["dtype"] == stored[name].dtype
        assert entry["fingerprint_delta"] == fingerprints.of_bytes(stored[name].data)
        assert entry["fingerprint_mllm"] == fingerprints.of_bytes(theirs.data)
        assert entry["fingerprint_reasoner"] == fingerprints.of_bytes(ours.data)
        assert ("fingerprint_base" in entry) == with_base
        lists = [t.values.astype(np.float64).ravel().tolist() for t in (ours, theirs, origin)]
        difference = reference.delta(lists[0], lists[2])
        for key, value in reference.statistics(lists[0], lists[1], difference).items():
            assert entry[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (name, key)
    manifest = made.prior.manifest
    assert manifest["num_elements"] == sum(prod(t.shape) for t in stored.values())
    assert manifest["size_bytes"] == sum(len(t.data) for t in stored.values())
    assert manifest["coverage"]["matched"] == manifest["coverage"]["selected"] == len(stored)
    assert manifest["parameters"]["dtype"] == dtype
    assert set(manifest["sources"]) == {"reasoner", "mllm"} | ({"base"} if with_base else set())


def test_the_manifest_does_not_depend_on_threads_shards_of_the_input_or_time(tmp_path):
    one = c.make_pair(tmp_path / "one")
    other = c.make_pair(tmp_path / "other", num_shards=(3, 2))
    first = run_prior(*one, tmp_path / "a", threads=1).prior.manifest
    second = run_prior(*other, tmp_path / "b", threads=3).prior.manifest
    for manifest in (first, second):
        manifest.pop("seal")
        for source in manifest["sources"].values():
            source.pop("source")
    assert first == second


def test_nonfinite_values_leave_no_figure_but_a_count(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    values = c.reasoner_tensors()[name].values.copy()
    values[0, 0], values[1, 1] = np.nan, np.inf
    pair = c.make_pair(tmp_path, reasoner={name: c.store(values)})
    with pytest.raises(CheckpointError, match=r"reasoner: .*up_proj\.weight: 2 values"):
        run_prior(*pair, tmp_path / "out")
    made = run_prior(*pair, tmp_path / "out", allow_nonfinite=True)
    entry = made.prior.tensors[name.removeprefix("model.")]
    assert entry["norm_delta"] is None
    assert entry["cosine"] is None
    assert entry["nonfinite"] == {f"reasoner: {name}": 2}


def test_a_tensor_that_only_the_base_lacks_is_skipped_with_a_count(tmp_path):
    pair = c.make_pair(tmp_path)
    tensors = c.reasoner_tensors(seed=9)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    base = c.write_checkpoint(tmp_path / "base", tensors, c.text_config())
    made = run_prior(*pair, tmp_path / "out", base=base, on_mismatch="skip")
    assert "layers.1.mlp.up_proj.weight" not in made.prior.tensors
    coverage = made.prior.manifest["coverage"]
    assert coverage["matched"] - coverage["missing_in_base"] == len(made.prior.tensors)
    assert coverage["missing_in_base"] == 1
    assert "1 of them have no partner in the base" in (tmp_path / "out/README.md").read_text()


def test_a_directory_that_is_no_prior_is_refused(tmp_path):
    pair = c.make_pair(tmp_path)
    with pytest.raises(SourceError, match=r"it has no prior\.json"):
        open_prior(pair.mllm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"kind": "drift-merge"}, "expected 'drift-prior'"),
        (lambda m: m | {"format_version": 99}, "format version 99"),
        (lambda m: {k: v for k, v in m.items() if k != "sources"}, "lacks sources"),
        (lambda m: m | {"tensors": []}, "table of tensors"),
        (lambda _: [1, 2], "of the kind 'list'"),
    ],
)
def test_a_manifest_of_another_kind_or_version_is_refused(tmp_path, change, message):
    pair = c.make_pair(tmp_path, layers=1)
    made = run_prior(*pair, tmp_path / "out")
    (tmp_path / "out/prior.json").write_text(json.dumps(change(made.prior.manifest)))
    with pytest.raises(CheckpointError, match=message):
        open_prior(tmp_path / "out")

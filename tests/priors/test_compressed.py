"""Compressed priors on disk: what the files promise, however they were made."""

import json
from math import prod

import numpy as np
import pytest
from safetensors import safe_open

import drift_merge
from drift_merge.engine import workspace
from drift_merge.errors import (
    VerificationError,
)
from drift_merge.priors.manifest import open_prior
from drift_merge.priors.summary import stored_cosines, stored_sentence
from drift_merge.priors.verify import verify_prior
from drift_merge.storage import fingerprints
from tests import checkpoints as c
from tests import reference_compression as reference
from tests.golden_files import compare_with_golden
from tests.priors.compressed import ALL, CODES, UP, shards_of, sources, values_of
from tests.priors.exact import exact_tensors
from tests.runs import run_compress, run_prior


@pytest.mark.parametrize("dtype", CODES)
def test_every_figure_of_every_tensor_is_true(pair, plain, tmp_path, dtype):
    made = run_prior(*pair, tmp_path / "out", dtype=dtype, modules="attn,mlp,norm")
    exact, stored = c.read_tensors(plain["float32"]), c.read_tensors(tmp_path / "out")
    before = open_prior(plain["float32"]).tensors
    scaled = 0
    for name, entry in made.prior.tensors.items():
        delta = exact[name].values.astype(np.float64)
        assert stored[name].shape == delta.shape == tuple(entry["shape"])
        assert entry["dtype"] == stored[name].dtype == (CODES[dtype] if delta.ndim > 1 else "BF16")
        assert entry["fingerprint_delta"] == fingerprints.of_bytes(stored[name].data)
        found = values_of(stored, name).astype(np.float64)
        if delta.ndim > 1:
            scale = stored[entry["scale"]]
            scaled += 1
            assert entry["scale"] == f"{name}:scale"
            assert (scale.dtype, scale.shape) == ("F32", delta.shape[:-1])
            assert entry["fingerprint_scale"] == fingerprints.of_bytes(scale.data)
            steps = np.abs(delta).max(-1) / reference.LARGEST[dtype]
            assert scale.values == pytest.approx(steps, rel=reference.SCALE_ERROR)
        else:
            assert "scale" not in entry
            assert found == pytest.approx(delta, rel=2.0**-8)
        assert entry["norm_delta"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert entry["norm_delta"] == pytest.approx(before[name]["norm_delta"], rel=1e-6)
        assert entry["norm_stored"] == pytest.approx(np.linalg.norm(found), rel=1e-5)
        cosine = reference.cosine(delta.ravel().tolist(), found.ravel().tolist())
        assert entry["cosine_stored"] == pytest.approx(cosine, abs=1e-8)
        assert made.prior.norm(name) == entry["norm_stored"]
    assert scaled == 14
    assert set(stored) == set(made.prior.tensors) | {
        entry["scale"] for entry in made.prior.tensors.values() if "scale" in entry
    }
    manifest = made.prior.manifest
    assert manifest["num_elements"] == sum(prod(e["shape"]) for e in made.prior.tensors.values())
    assert manifest["size_bytes"] == sum(len(t.data) for t in stored.values())
    assert manifest["parameters"]["dtype"] == dtype
    assert open_prior(plain["float32"]).norm(UP) == before[UP]["norm_delta"]


@pytest.mark.parametrize("dtype", CODES)
def test_compressing_a_float32_prior_gives_the_shards_of_computing_it(pair, plain, tmp_path, dtype):
    run_prior(*pair, tmp_path / "computed", dtype=dtype, modules="attn,mlp,norm")
    made = run_compress(plain["float32"], tmp_path / "compressed", dtype=dtype)
    assert shards_of(tmp_path / "compressed") == shards_of(tmp_path / "computed")
    assert "through" not in made.prior.manifest["parameters"]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("before", ["bfloat16", "float16", "source"])
def test_compressing_a_narrower_prior_gives_the_shards_of_computing_through_its_dtype(
    pair, plain, tmp_path, dtype, before
):
    values = {"dtype": dtype, "through": before, "modules": "attn,mlp,norm"}
    run_prior(*pair, tmp_path / "computed", **values)
    made = run_compress(plain[before], tmp_path / "compressed", dtype=dtype)
    assert shards_of(tmp_path / "compressed") == shards_of(tmp_path / "computed")
    assert made.prior.manifest["parameters"]["through"] == before
    assert made.prior.manifest["compressed_from"]["dtype"] == before
    report = verify_prior(made.prior, **sources(pair), sample=ALL)
    assert len(report.recomputed) == report.num_tensors == len(made.prior.tensors)


@pytest.mark.parametrize("dtype", ["F64", "F32"])
def test_tensors_of_a_wider_mllm_pass_through_their_own_dtype(tmp_path, dtype):
    pair = c.make_pair(tmp_path, layers=1, dtype=dtype)
    run_prior(*pair, tmp_path / "plain", dtype="source")
    run_compress(tmp_path / "plain", tmp_path / "compressed")
    run_prior(*pair, tmp_path / "computed", dtype="int8")
    assert shards_of(tmp_path / "compressed") == shards_of(tmp_path / "computed")


def test_of_a_prior_only_what_compression_changes_is_changed(plain, tmp_path):
    made = run_compress(plain["bfloat16"], tmp_path / "out", max_shard_size="2KB").prior
    before, after = open_prior(plain["bfloat16"]).manifest, made.manifest
    assert set(after) == set(before) | {"compressed_from"}
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"parameters", "size_bytes", "shards", "index", "tensors", "seal"}
    assert len(after["shards"]) > 1
    own = {"dtype", "scale", "fingerprint_delta", "fingerprint_scale"}
    own |= {"norm_stored", "cosine_stored"}
    for name, entry in made.tensors.items():
        old = before["tensors"][name]
        assert {key for key in entry if entry[key] != old.get(key)} <= own
        assert entry["norm_delta"] == old["norm_delta"]
        assert old.keys() <= entry.keys()


def test_vectors_and_short_rows_stay_in_16_bits(tmp_path):
    short = "model.layers.0.mlp.short.weight"
    pair = c.make_pair(
        tmp_path,
        reasoner={short: c.store(np.ones((6, 4)))},
        mllm={short: c.store(np.zeros((6, 4)))},
    )
    made = run_prior(*pair, tmp_path / "out", dtype="int8").prior
    assert made.tensors["layers.0.mlp.short.weight"]["dtype"] == "BF16"
    assert made.tensors["layers.0.self_attn.q_proj.bias"]["dtype"] == "BF16"
    run_prior(*pair, tmp_path / "half", dtype="float16")
    made = run_compress(tmp_path / "half", tmp_path / "from-half").prior
    assert made.tensors["layers.0.self_attn.q_proj.bias"]["dtype"] == "F16"


def test_tensors_of_three_dimensions_have_a_scale_for_every_vector(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    random = np.random.default_rng(0)
    ours, theirs = (c.store(random.normal(0, 1, (3, 5, 16))) for _ in range(2))
    pair = c.make_pair(tmp_path, layers=1, reasoner={name: ours}, mllm={name: theirs})
    run_prior(*pair, tmp_path / "out", dtype="int8", modules="re:experts")
    stored = c.read_tensors(tmp_path / "out")
    (codes,) = [n for n in stored if not n.endswith(":scale")]
    assert stored[f"{codes}:scale"].shape == (3, 5)
    exact = ours.values - theirs.values
    step = stored[f"{codes}:scale"].values[..., None]
    assert (np.abs(values_of(stored, codes) - exact) <= 0.5001 * step).all()


def test_a_tensor_that_is_equal_in_both_models_has_no_cosine_and_is_not_the_worst(tmp_path):
    same = c.reasoner_tensors()[f"model.{UP}"]
    pair = c.make_pair(tmp_path, mllm={f"model.{UP}": same})
    made = run_prior(*pair, tmp_path / "out", dtype="float8_e4m3fn").prior
    assert made.tensors[UP]["cosine_stored"] is None
    assert made.tensors[UP]["norm_stored"] == 0.0
    assert not values_of(c.read_tensors(tmp_path / "out"), UP).any()
    kept = stored_cosines(made.tensors)
    assert 0.99 < kept.worst <= kept.cosine < 1.0
    assert kept.worst_name != UP


def test_the_sentence_on_what_is_kept_is_that_of_all_tensors_as_one_vector(pair, plain, tmp_path):
    made = run_prior(*pair, tmp_path / "out", dtype="int8", modules="attn,mlp,norm").prior
    exact, stored = c.read_tensors(plain["float32"]), c.read_tensors(tmp_path / "out")
    names = list(made.tensors)
    one, other = (
        np.concatenate([read(n).astype(np.float64).ravel() for n in names])
        for read in (lambda n: exact[n].values, lambda n: values_of(stored, n))
    )
    kept = stored_cosines(made.tensors)
    whole = reference.cosine(one.tolist(), other.tolist())
    assert kept.cosine == pytest.approx(whole, abs=1e-7)
    cosines = {n: made.tensors[n]["cosine_stored"] for n in names}
    assert kept.worst == min(cosines.values()) == cosines[kept.worst_name]
    sentence = stored_sentence(made.tensors)
    assert f"{whole:.6f} overall" in sentence
    assert kept.worst_name in sentence
    assert sentence in (tmp_path / "out/README.md").read_text()
    assert stored_sentence(open_prior(plain["bfloat16"]).tensors) == ""


@pytest.mark.parametrize("chunk", [1, 7, 100, 2**17])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_chunk_and_any_threads_give_the_same_shards(
    pair, tmp_path, monkeypatch, chunk, threads
):
    run_prior(*pair, tmp_path / "one", dtype="int8")
    monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
    run_prior(*pair, tmp_path / "other", dtype="int8", threads=threads)
    assert shards_of(tmp_path / "other") == shards_of(tmp_path / "one")


def test_any_threads_compress_to_the_same_files(plain, tmp_path):
    for threads in (1, 4):
        run_compress(plain["bfloat16"], tmp_path / str(threads), threads=threads)
    assert c.read_files(tmp_path / "1") == c.read_files(tmp_path / "4")


def test_the_python_face_makes_the_same_files_and_reads_them(plain, tmp_path):
    run_compress(plain["bfloat16"], tmp_path / "one")
    made = drift_merge.compress(plain["bfloat16"], tmp_path / "two", progress=False)
    assert c.read_files(tmp_path / "one") == c.read_files(tmp_path / "two")
    with drift_merge.open_deltas(made) as deltas:
        found = deltas.read(UP, 3, 5)
    expected = values_of(c.read_tensors(tmp_path / "one"), UP)[3:5]
    assert found.tolist() == expected.tolist()


def test_other_readers_find_codes_and_scales_by_name(pair, tmp_path):
    run_prior(*pair, tmp_path / "out", dtype="float8_e4m3fn", max_shard_size="2KB")
    index = json.loads((tmp_path / "out/prior.safetensors.index.json").read_text())
    seen = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            seen |= {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
            assert {index["weight_map"][name] for name in shard.keys()} == {file.name}  # noqa: SIM118
    assert seen[UP].get_dtype() == "F8_E4M3"
    assert seen[f"{UP}:scale"].get_dtype() == "F32"
    assert seen[f"{UP}:scale"].get_shape() == seen[UP].get_shape()[:1]


def test_the_manifest_of_a_fixed_pair_compressed_is_the_golden_one(tmp_path, monkeypatch):
    shapes = c.text_shapes(1)
    c.write_checkpoint(tmp_path / "reasoner", exact_tensors(shapes, 5), c.text_config(1))
    own = exact_tensors(shapes | c.vision_shapes(), 7)
    c.write_checkpoint(tmp_path / "mllm", own, c.mllm_config(1))
    monkeypatch.chdir(tmp_path)
    run_prior("reasoner", "mllm", tmp_path / "prior", max_shard_size="2KB")
    run_compress(tmp_path / "prior", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/prior.json").read_text())
    assert manifest["tool"].pop("version")
    assert manifest["compressed_from"]["tool"].pop("version")
    assert manifest.pop("seal")
    for entry in manifest["tensors"].values():
        # Sums of these are not exact: their last digits are the processor's.
        entry["norm_stored"] = round(entry["norm_stored"], 4)
        entry["cosine_stored"] = round(entry["cosine_stored"], 6)
    compare_with_golden("prior_compressed.json", json.dumps(manifest, indent=1) + "\n")


def test_verify_names_codes_and_scales_computed_again_differently(pair, tmp_path):
    made = run_prior(*pair, tmp_path / "out", dtype="int8").prior
    other = run_prior(*pair, tmp_path / "other", dtype="float8_e4m3fn").prior
    entry = made.tensors[UP]
    entry["fingerprint_scale"] = other.tensors[UP]["fingerprint_scale"]
    from drift_merge.artifacts.checks import check_sample
    from drift_merge.plans.prepare import prepare
    from drift_merge.recipes.recipe import Recipe

    recipe = Recipe.from_parameters(
        "prior",
        made.manifest["parameters"],
        reasoners=[str(pair.reasoner)],
        mllm=str(pair.mllm),
    )
    plan = prepare(recipe, quiet=True).plan()
    with pytest.raises(VerificationError, match=f"^{UP}:scale computed again differs"):
        check_sample(plan, made.tensors, "fingerprint_delta", sample=ALL, seed=0)

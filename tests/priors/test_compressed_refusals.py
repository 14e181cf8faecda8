"""What a compressed prior, its manifest or a command refuses."""

import numpy as np
import pytest

from drift_merge.errors import (
    AlignmentError,
    CheckpointError,
    OutputError,
    RecipeError,
    VerificationError,
)
from drift_merge.priors.manifest import open_prior
from tests import checkpoints as c
from tests.artifacts.damage import edit_json, flip
from tests.priors.compressed import CODES, UP
from tests.runs import run_compress, run_prior


def refused(prior, out, error, match):
    with pytest.raises(error, match=match):
        run_compress(prior, out)
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()


def test_one_flipped_bit_of_any_tensor_is_refused_and_the_tensor_named(prior, tmp_path):
    (shard,) = prior.glob("*.safetensors")
    end = shard.stat().st_size
    last = list(c.read_shard(shard))[-1]
    for at in (end - 1, end - 2):
        flip(shard, at)
        refused(prior, tmp_path / "out", VerificationError, rf"{last} in .* differs from its")
        flip(shard, at)
    run_compress(prior, tmp_path / "out")


def test_a_changed_manifest_or_index_is_refused(prior, tmp_path):
    original = (prior / "prior.json").read_text()
    edit_json(prior / "prior.json", lambda m: m["tensors"][UP].update(norm_delta=1.0))
    refused(prior, tmp_path / "out", VerificationError, r"prior\.json was changed")
    (prior / "prior.json").write_text(original)
    index = prior / "prior.safetensors.index.json"
    edit_json(index, lambda value: value.update(more=1))
    refused(prior, tmp_path / "out", VerificationError, "index")


def test_shards_of_another_run_are_refused(prior, plain, tmp_path):
    for path in plain["float16"].glob("*.safetensors"):
        (prior / path.name).write_bytes(path.read_bytes())
    refused(prior, tmp_path / "out", CheckpointError, r"is F16 .* but the manifest says BF16")


def test_a_compressed_prior_is_not_compressed_again(pair, tmp_path):
    run_prior(*pair, tmp_path / "prior", dtype="int8")
    for dtype in CODES:
        with pytest.raises(RecipeError, match=r"compressed already \(int8\)"):
            run_compress(tmp_path / "prior", tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int4", "source"])
@pytest.mark.parametrize("before", ["float32", "bfloat16"])
def test_a_dtype_that_compresses_nothing_is_refused(plain, tmp_path, before, dtype):
    with pytest.raises(RecipeError, match=rf"--dtype is '{dtype}'; expected one of float8"):
        run_compress(plain[before], tmp_path / "out", dtype=dtype)


def test_nan_and_inf_are_refused_when_computing_and_when_compressing(tmp_path):
    values = c.reasoner_tensors()[f"model.{UP}"].values.copy()
    values[0, 0], values[1, 1] = np.nan, np.inf
    pair = c.make_pair(tmp_path, reasoner={f"model.{UP}": c.store(values)})
    with pytest.raises(CheckpointError, match=rf"reasoner: model\.{UP}: 2 values"):
        run_prior(*pair, tmp_path / "out", dtype="int8")
    with pytest.raises(RecipeError, match="cannot hold NaN or Inf"):
        run_prior(*pair, tmp_path / "out", dtype="int8", allow_nonfinite=True)
    run_prior(*pair, tmp_path / "prior", allow_nonfinite=True)
    refused(tmp_path / "prior", tmp_path / "out", RecipeError, f"holds NaN or Inf .{UP}")


def test_a_delta_that_float32_cannot_hold_is_refused_by_name(tmp_path):
    values = c.reasoner_tensors()[f"model.{UP}"].values.astype(np.float64)
    values[0, 0] = 1e300
    pair = c.make_pair(tmp_path, reasoner={f"model.{UP}": c.store(values, "F64")})
    with pytest.raises(CheckpointError, match=rf"the result in I8: {UP}: 1 values"):
        run_prior(*pair, tmp_path / "out", dtype="int8")


@pytest.mark.parametrize("values", [{"dtype": "bfloat16"}, {"dtype": "source"}])
def test_through_without_compression_is_refused(pair, tmp_path, values):
    with pytest.raises(RecipeError, match="--through"):
        run_prior(*pair, tmp_path / "out", through="float16", **values)


def test_a_merge_cannot_be_compressed(pair, tmp_path):
    from tests.runs import run_linear

    with pytest.raises(RecipeError, match="--dtype is 'int8'"):
        run_linear(*pair, tmp_path / "out", 0.1, dtype="int8")


def test_a_tensor_named_like_scales_is_refused(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight:scale"
    values = c.store(np.ones((4, 16)))
    pair = c.make_pair(tmp_path, reasoner={name: values}, mllm={name: values})
    run_prior(*pair, tmp_path / "plain")
    with pytest.raises(AlignmentError, match="ends with ':scale'"):
        run_prior(*pair, tmp_path / "out", dtype="int8")


def test_an_output_inside_the_prior_or_there_already_is_refused(prior, tmp_path):
    with pytest.raises(OutputError, match="is inside the input"):
        run_compress(prior, prior / "out")
    run_compress(prior, tmp_path / "out")
    before = c.read_files(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        run_compress(prior, tmp_path / "out", dtype="float8_e4m3fn")
    assert c.read_files(tmp_path / "out") == before
    run_compress(prior, tmp_path / "out", dtype="float8_e4m3fn", overwrite=True)
    assert open_prior(tmp_path / "out").manifest["parameters"]["dtype"] == "float8_e4m3fn"

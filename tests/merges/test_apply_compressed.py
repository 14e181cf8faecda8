"""A compressed prior is applied like the plain one that holds its decompressed values."""

import shutil

import numpy as np
import pytest

from drift_merge.engine import workspace
from drift_merge.errors import AlignmentError, CheckpointError, VerificationError
from drift_merge.merges.verify import verify_merge
from drift_merge.priors.manifest import open_prior
from tests import checkpoints as c
from tests.runs import run_apply, run_prior

UP = "layers.0.mlp.up_proj.weight"


@pytest.fixture(params=["int8", "float8_e4m3fn"])
def made(request, tmp_path):
    """A pair, its compressed prior, and a plain one of the same values."""
    pair = c.make_pair(tmp_path, num_shards=2)
    run_prior(*pair, tmp_path / "compressed", dtype=request.param, modules="attn,mlp,norm")
    run_prior(*pair, tmp_path / "plain", dtype="float32", modules="attn,mlp,norm")
    stored = c.read_tensors(tmp_path / "compressed")
    (shard,) = (tmp_path / "plain").glob("*.safetensors")
    tensors = c.read_shard(shard)
    for name in tensors:
        values = stored[name].values.astype(np.float32)
        if f"{name}:scale" in stored:
            values = values * stored[f"{name}:scale"].values[..., None]
        tensors[name] = c.store(values, "F32")
    c.write_shard(shard, tensors)
    return tmp_path, pair


@pytest.mark.parametrize("chunk", [1, 40, 2**18])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_merge_is_that_of_the_decompressed_values(made, monkeypatch, chunk, threads):
    directory, pair = made
    run_apply(directory / "plain", pair.mllm, directory / "expected")
    monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
    merge = run_apply(directory / "compressed", pair.mllm, directory / "out", threads=threads).merge
    assert c.read_tensors(directory / "out") == c.read_tensors(directory / "expected")
    assert merge.manifest["counts"]["inject"] == len(open_prior(directory / "plain").tensors)


def test_scale_one_gives_the_reasoner_within_the_rounding_of_the_codes(made):
    directory, pair = made
    run_apply(directory / "compressed", pair.mllm, directory / "out", scale=1.0, dtype="float32")
    found, reasoner = c.read_tensors(directory / "out"), c.read_tensors(pair.reasoner)
    step = c.read_tensors(directory / "compressed")[f"{UP}:scale"].values[:, None]
    error = np.abs(found[f"model.{UP}"].values - reasoner[f"model.{UP}"].values)
    # int8: half a step; float8: a sixteenth of the largest code, 448 steps.
    assert (error <= step * 16.001).all()
    assert error.any()


def test_the_merge_can_be_verified_and_knows_codes_and_scales_of_its_prior(made):
    directory, pair = made
    merge = run_apply(directory / "compressed", pair.mllm, directory / "out").merge
    given = {"reasoners": [str(directory / "compressed")], "mllm": str(pair.mllm)}
    report = verify_merge(merge, **given, sample=10**6)
    assert len(report.recomputed) == report.num_tensors
    (shard,) = (directory / "compressed").glob("*.safetensors")
    for name in (UP, f"{UP}:scale"):
        tensors = c.read_shard(shard)
        changed = tensors[name]._replace(data=bytes([1]) + tensors[name].data[1:])
        c.write_shard(shard, tensors | {name: changed})
        with pytest.raises(VerificationError, match=r"up_proj\.weight: the reasoners given"):
            verify_merge(merge, **given, sample=10**6)
        c.write_shard(shard, tensors)


def test_another_mllm_is_refused(made):
    directory, _ = made
    tensors = c.mllm_tensors(seed=5)
    other = c.write_checkpoint(directory / "other", tensors, c.mllm_config())
    with pytest.raises(AlignmentError, match="computed against another mllm"):
        run_apply(directory / "compressed", other, directory / "out")
    assert not (directory / "out").exists()


def test_a_prior_without_its_scales_is_refused(made):
    directory, pair = made
    shutil.copytree(directory / "compressed", directory / "broken")
    (shard,) = (directory / "broken").glob("*.safetensors")
    tensors = c.read_shard(shard)
    del tensors[f"{UP}:scale"]
    c.write_shard(shard, tensors)
    with pytest.raises(CheckpointError, match=f"needs scales {UP}:scale"):
        run_apply(directory / "broken", pair.mllm, directory / "out")

"""Streamed equals in-memory, bit for bit: for any chunk, threads and sharding."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.engine import workspace
from tests import checkpoints as c
from tests.runs import in_memory_delta, in_memory_linear, run_linear, run_prior
from tests.strategies import few

ATTN_MLP = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.")
WITH_NORMS = re.compile(r"model\.(layers\.|norm\.)")


def expected_prior(pair, base=None):
    reasoner, mllm = c.read_tensors(pair.reasoner), c.read_tensors(pair.mllm)
    origin = c.read_tensors(base) if base else mllm
    return {
        name.removeprefix("model."): in_memory_delta(reasoner[name], origin[name])
        for name in mllm
        if ATTN_MLP.match(name)
    }


def expected_merge(pair, weight, code=None):
    reasoner, mllm = c.read_tensors(pair.reasoner), c.read_tensors(pair.mllm)
    return {
        name: in_memory_linear(tensor, [reasoner[name]], [weight], code)
        if WITH_NORMS.match(name)
        else tensor
        for name, tensor in mllm.items()
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return c.make_pair(tmp_path_factory.mktemp("pair"), num_shards=(2, 3))


@pytest.fixture(scope="module")
def merged_once(pair):
    return expected_merge(pair, 0.3)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000, 2**17])
def test_any_chunk_size_gives_the_prior_that_memory_gives(pair, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
    run_prior(*pair, tmp_path / "out")
    assert c.read_tensors(tmp_path / "out") == expected_prior(pair)


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**17])
def test_any_chunk_size_gives_the_merge_that_memory_gives(
    pair, merged_once, tmp_path, monkeypatch, chunk
):
    monkeypatch.setattr(workspace, "CPU_CHUNK", chunk)
    run_linear(*pair, tmp_path / "out", 0.3)
    assert c.read_tensors(tmp_path / "out") == merged_once


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_files(pair, tmp_path, threads):
    for kind in (run_prior, run_linear):
        run = f"{kind.__name__}{threads}"
        kind(*pair, tmp_path / "one", threads=1)
        kind(*pair, tmp_path / run, threads=threads)
        assert c.read_files(tmp_path / run) == c.read_files(tmp_path / "one")
        (tmp_path / "one").rename(tmp_path / f"{run}-one")


@pytest.mark.parametrize("shards", [(1, 1), (1, 4), (4, 1), (5, 3)])
def test_any_sharding_of_the_inputs_gives_the_same_files(tmp_path, shards):
    # The same name for every variant: a card tells where its sources were.
    made = c.make_pair(tmp_path / "a", num_shards=shards)
    plain = c.make_pair(tmp_path / "b")
    for kind in (run_prior, run_linear):
        one, other = tmp_path / f"{kind.__name__}1", tmp_path / f"{kind.__name__}2"
        kind(*made, one)
        kind(*plain, other)
        assert c.read_tensors(one) == c.read_tensors(other)
        ours, theirs = (
            [p for p in sorted(d.iterdir()) if p.suffix == ".safetensors"] for d in (one, other)
        )
        assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]


@pytest.mark.parametrize("size", ["1B", "300B", "1KB", "4KB", "1GB"])
def test_any_sharding_of_the_output_gives_the_same_tensors(pair, merged_once, tmp_path, size):
    run_linear(*pair, tmp_path / "merge", 0.3, max_shard_size=size)
    assert c.read_tensors(tmp_path / "merge") == merged_once
    run_prior(*pair, tmp_path / "prior", max_shard_size=size)
    assert c.read_tensors(tmp_path / "prior") == expected_prior(pair)


def test_with_a_base_delta_is_reasoner_minus_base(tmp_path):
    pair = c.make_pair(tmp_path)
    base = c.write_checkpoint(tmp_path / "base", c.reasoner_tensors(seed=9), c.text_config())
    made = run_prior(*pair, tmp_path / "out", base=base)
    assert c.read_tensors(tmp_path / "out") == expected_prior(pair, base)
    assert made.prior.manifest["formula"] == "delta = theta_reasoner - theta_base"
    assert all("fingerprint_base" in entry for entry in made.prior.tensors.values())


@pytest.mark.parametrize("reasoner", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("mllm", ["F32", "BF16", "F64"])
def test_mixed_dtypes_are_computed_wide_and_rounded_once(tmp_path, reasoner, mllm):
    shapes = c.text_shapes(1)
    ours = c.write_checkpoint(
        tmp_path / "r", c.random_tensors(shapes, 1, dtype=reasoner), c.text_config(1)
    )
    theirs = c.write_checkpoint(
        tmp_path / "m",
        c.random_tensors(shapes | c.vision_shapes(), 2, dtype=mllm),
        c.mllm_config(1),
    )
    pair = c.Pair(ours, theirs)
    run_prior(*pair, tmp_path / "prior")
    assert c.read_tensors(tmp_path / "prior") == expected_prior(pair)
    run_linear(*pair, tmp_path / "merge", 0.3)
    assert c.read_tensors(tmp_path / "merge") == expected_merge(pair, 0.3)


SHAPES = ((1,), (5,), (1, 7), (3, 5), (17, 3), (4, 1), (2, 3, 5), (0, 5), ())


@given(
    st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    st.sampled_from((1, 3, 7, 64)),
    st.sampled_from(("1B", "50B", "1KB")),
    st.integers(1, 3),
)
@few
def test_tensors_of_any_shape_stream_as_they_compute_in_memory(
    tmp_path_factory, shapes, chunk, size, threads
):
    named = {f"model.layers.{i}.mlp.up_proj.weight": s for i, s in enumerate(shapes)}
    named |= {"model.layers.0.mlp.down_proj.weight": (3, 4), "model.embed_tokens.weight": (3, 4)}
    directory = tmp_path_factory.mktemp("any")
    ours = c.write_checkpoint(directory / "r", c.random_tensors(named, 1), {})
    tensors = c.random_tensors(named | {"visual.x": (2,)}, 2)
    theirs = c.write_checkpoint(directory / "m", tensors, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "CPU_CHUNK", chunk)
        run_prior(
            ours, theirs, directory / "out", threads=threads, max_shard_size=size, modules="mlp"
        )
    assert c.read_tensors(directory / "out") == expected_prior(c.Pair(ours, theirs))


def test_unaligned_data_behind_a_header_of_odd_length_is_read_exactly(tmp_path):
    pair = c.make_pair(tmp_path)
    raw = (pair.reasoner / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    odd = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (pair.reasoner / "model.safetensors").write_bytes(odd)
    run_prior(*pair, tmp_path / "out")
    assert c.read_tensors(tmp_path / "out") == expected_prior(pair)


def test_denormals_and_signed_zeros_survive(tmp_path):
    name = "model.layers.0.self_attn.o_proj.weight"
    values = np.zeros((c.HIDDEN, c.HIDDEN), np.float32)
    values[0] = [-0.0, 0.0, 2.0**-133, -(2.0**-133), *[2.0**-126] * 12]
    special = c.store(values)
    pair = c.make_pair(tmp_path, reasoner={name: special}, mllm={name: special})
    run_linear(*pair, tmp_path / "out", 0.25)
    assert c.read_tensors(tmp_path / "out")[name] == special
    run_prior(*pair, tmp_path / "prior")
    found = c.read_tensors(tmp_path / "prior")["layers.0.self_attn.o_proj.weight"]
    assert found.data == bytes(len(special.data))


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F64", "float32"), ("F32", "bfloat16"), ("F32", "float16")]
)
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "visual.merger.mlp.2.weight"]
)
def test_a_value_too_large_for_the_output_dtype_is_refused_never_written_as_inf(
    tmp_path, stored, dtype, name
):
    from drift_merge.errors import CheckpointError

    pair = c.make_pair(tmp_path, dtype=stored)
    for path in (pair.reasoner, pair.mllm):
        tensors = c.read_tensors(path)
        if name in tensors:
            values = tensors[name].values.copy()
            values.flat[3] = {"F64": 1e300, "F32": 3.4028e38}[stored]
            tensors[name] = c.store(values, stored)
            c.write_shard(path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        run_linear(*pair, tmp_path / "out", 0.1, dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_threads_of_torch_are_given_back(pair, tmp_path):
    before = torch.get_num_threads()
    run_prior(*pair, tmp_path / "out", threads=2)
    assert torch.get_num_threads() == before

"""Deltas by name: rows, blocks and flat ranges, equal to the whole tensor however it is stored."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.errors import CheckpointError, RecipeError
from drift_merge.priors.deltas import open_deltas
from drift_merge.priors.manifest import open_prior
from tests import checkpoints as c
from tests.runs import run_prior
from tests.strategies import quick

DTYPES = ("bfloat16", "float32", "int8", "float8_e4m3fn")
UP = "layers.0.mlp.up_proj.weight"  # (24, 16)
BIAS = "layers.0.self_attn.q_proj.bias"  # (16,)


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    """Priors of one pair by dtype."""
    directory = tmp_path_factory.mktemp("priors")
    pair = c.make_pair(directory, layers=1)
    for dtype in DTYPES:
        run_prior(*pair, directory / dtype, dtype=dtype, max_shard_size="1KB")
    return {dtype: open_prior(directory / dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def opened(priors):
    return {dtype: open_deltas(prior) for dtype, prior in priors.items()}


def expected(prior, name):
    """A delta in float32, by numpy alone."""
    tensors = c.read_tensors(prior.path)
    values = tensors[name].values.astype(np.float32)
    scales = tensors.get(f"{name}:scale")
    return torch.tensor(values if scales is None else values * scales.values[..., None])


def ranges(size):
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted).map(tuple)


@pytest.mark.parametrize("dtype", DTYPES)
def test_names_and_shapes_are_those_of_the_manifest_without_scales(priors, opened, dtype):
    tensors = priors[dtype].tensors
    shapes = [(name, tuple(entry["shape"])) for name, entry in tensors.items()]
    assert list(opened[dtype].shapes.items()) == shapes
    assert opened[dtype].matrix(UP) == (24, 16)
    assert opened[dtype].matrix(BIAS) == (16, 1)
    assert opened[dtype].is_compressed(UP) == (dtype in DTYPES[2:])
    assert not opened[dtype].is_compressed(BIAS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_delta_read_whole_is_what_is_stored(priors, opened, dtype):
    for name in opened[dtype].shapes:
        found = opened[dtype].read(name)
        assert found.shape == opened[dtype].matrix(name)
        assert torch.equal(found.float().flatten(), expected(priors[dtype], name).flatten())


@given(st.sampled_from(DTYPES), ranges(24), ranges(16))
@quick
def test_any_block_is_that_of_the_whole(opened, dtype, rows, cols):
    whole = opened[dtype].read(UP)
    found = opened[dtype].block(UP, rows, cols)
    assert torch.equal(found, whole[rows[0] : rows[1], cols[0] : cols[1]])
    assert torch.equal(opened[dtype].read(UP, *rows), whole[rows[0] : rows[1]])


@given(st.sampled_from(DTYPES), st.sampled_from([UP, BIAS]), st.data())
@quick
def test_any_flat_range_is_that_of_the_whole(opened, dtype, name, data):
    whole = opened[dtype].read(name).flatten()
    begin, end = data.draw(ranges(whole.numel()))
    found = opened[dtype].flat(name, begin, end)
    assert torch.equal(found, whole[begin:end])
    out = torch.full((end - begin,), 7.0, dtype=torch.float64)
    assert opened[dtype].flat(name, begin, end, out) is out
    assert torch.equal(out, whole[begin:end].double())


@pytest.mark.parametrize("out", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_the_caller_is_filled_with_the_same_values(opened, dtype, out):
    target = torch.empty(5, 3, dtype=out)
    found = opened[dtype].block(UP, (2, 7), (4, 7), target)
    assert found.data_ptr() == target.data_ptr()
    assert torch.equal(target, opened[dtype].block(UP, (2, 7), (4, 7)).to(out))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_what_is_stored_plainly_comes_in_its_dtype_in_memory_of_the_caller(opened, dtype):
    deltas = opened[dtype]
    whole = deltas.read(UP)
    assert whole.dtype == getattr(torch, dtype)
    assert deltas.block(UP, (2, 7), (4, 7)).dtype == deltas.flat(UP, 9, 11).dtype == whole.dtype
    whole.zero_()
    assert deltas.read(UP).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_name_or_a_range_that_is_not_there_is_refused(opened, dtype):
    deltas = opened[dtype]
    with pytest.raises(RecipeError, match=r"has no delta 'layers\.9'"):
        deltas.read("layers.9")
    if deltas.is_compressed(UP):
        with pytest.raises(RecipeError, match="has no delta"):
            deltas.read(f"{UP}:scale")
    for rows, cols in (
        ((0, 25), (0, 16)),
        ((-1, 3), (0, 16)),
        ((5, 3), (0, 16)),
        ((0, 1), (0, 17)),
    ):
        with pytest.raises(RecipeError, match="is asked for"):
            deltas.block(UP, rows, cols)
    with pytest.raises(RecipeError, match="it has 384"):
        deltas.flat(UP, 0, 385)


def test_shards_that_differ_from_the_manifest_are_refused(tmp_path):
    pair = c.make_pair(tmp_path, layers=1)
    run_prior(*pair, tmp_path / "prior", dtype="int8")
    prior = open_prior(tmp_path / "prior")
    prior.manifest["tensors"][UP]["dtype"] = "BF16"
    with pytest.raises(CheckpointError, match=rf"{UP} is I8 .* but the manifest says BF16"):
        open_deltas(prior)
    (shard,) = prior.path.glob("*.safetensors")
    tensors = c.read_shard(shard)
    for change, match in (
        ({f"{UP}:scale": None}, "there are none"),
        ({f"{UP}:scale": c.store(np.ones(23), "F32")}, r"got F32 \(23,\)"),
        ({f"{UP}:scale": c.store(np.ones(24))}, r"got BF16 \(24,\)"),
        ({"norm.weight:scale": c.store(np.ones(1), "F32")}, "the scale of no compressed tensor"),
    ):
        joined = tensors | change
        c.write_shard(shard, {name: t for name, t in joined.items() if t is not None})
        with pytest.raises(CheckpointError, match=match):
            open_deltas(open_prior(prior.path))


def test_a_file_that_was_cut_short_is_an_error_and_no_crash(tmp_path):
    pair = c.make_pair(tmp_path, layers=1)
    run_prior(*pair, tmp_path / "prior", dtype="int8")
    with open_deltas(open_prior(tmp_path / "prior")) as deltas:
        deltas.read(UP)
        (shard,) = (tmp_path / "prior").glob("*.safetensors")
        with open(shard, "r+b") as file:
            file.truncate(100)
        with pytest.raises(CheckpointError, match="changed while it was being used"):
            deltas.read(UP)

"""Reading deltas: from the map, only what is asked for, whatever the region."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import drift_merge
from drift_merge.errors import AlignmentError, CheckpointError, SourceError, VerificationError
from drift_merge.training.deltas import files as module
from drift_merge.training.deltas.files import FileDeltas
from drift_merge.training.deltas.opened import open_for_training
from drift_merge.training.units import Block, Origin, Region, Unit
from tests.strategies import few
from tests.training.toys import make_toy, read_region

NAME = "layers.0.mlp.up_proj.weight"  # (24, 16)


def unit_of(shape, origin):
    parameter = torch.nn.Parameter(torch.empty(shape))
    return Unit(NAME, "p", parameter, "mlp", 0, shape, 0, origin)


@few
@given(st.data())
def test_every_region_of_every_origin_is_the_delta(toy, data):
    whole = toy.deltas()[NAME]
    is_transposed = data.draw(st.booleans())
    stored = whole.T if is_transposed else whole
    row = data.draw(st.integers(0, stored.shape[0] - 1))
    rows = data.draw(st.integers(1, stored.shape[0] - row))
    unit_values = stored[row : row + rows]
    origin = Origin(0, row, True) if is_transposed else Origin(row, 0, False)
    unit = unit_of(tuple(unit_values.shape), origin)
    begin = data.draw(st.integers(0, unit.numel))
    end = data.draw(st.integers(begin, unit.numel))
    source = FileDeltas([open_for_training(toy.prior)], [1.0])
    flat = read_region(source, unit, Region(flat=(begin, end)), data.draw(st.integers(1, 99)))
    assert torch.equal(flat, unit_values.reshape(-1)[begin:end])
    cut = (slice(0, rows), slice(2, 7))
    assert torch.equal(read_region(source, unit, Region(slices=cut)), unit_values[cut].reshape(-1))


def test_a_rank_reads_its_region_and_no_more(toy, monkeypatch):
    counted = []
    original = module.read_delta

    def counting(opened, name, block, out):
        counted.append(block.numel)
        original(opened, name, block, out)

    monkeypatch.setattr(module, "read_delta", counting)
    source = FileDeltas([open_for_training(toy.prior)], [1.0])
    unit = unit_of((24, 16), Origin(0, 0, False))
    read_region(source, unit, Region(slices=(slice(6, 12), slice(0, 16))))
    assert sum(counted) == 6 * 16
    counted.clear()
    read_region(source, unit, Region(flat=(10, 30)))
    assert sum(counted) == 20


def test_rows_are_those_of_the_unit(toy):
    source = FileDeltas([open_for_training(toy.prior)], [2.0])
    unit = unit_of((10, 16), Origin(4, 0, False))
    assert torch.equal(source.rows(unit, 1, 3), 2 * toy.deltas()[NAME][5:7])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_stored_dtype_is_widened_exactly(tmp_path, dtype):
    toy = make_toy(tmp_path, dtype=dtype)
    source = FileDeltas([open_for_training(toy.prior)], [1.0])
    unit = unit_of((24, 16), Origin(0, 0, False))
    found = read_region(source, unit, Region(flat=(0, 384)))
    assert torch.equal(found, toy.deltas()[NAME].float().reshape(-1))


def test_load_prior_opens_a_directory_or_refuses(toy, tmp_path):
    assert drift_merge.load_prior(toy.prior.path) == toy.prior
    assert drift_merge.load_prior(str(toy.prior.path)) == toy.prior
    with pytest.raises(SourceError):
        drift_merge.load_prior(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"no prior\.json"):
        drift_merge.load_prior(toy.pair.mllm)


def test_a_changed_manifest_is_refused(toy, tmp_path):
    copy = shutil.copytree(toy.prior.path, tmp_path / "copy")
    text = (copy / "prior.json").read_text()
    (copy / "prior.json").write_text(text.replace('"module": "mlp"', '"module": "attn"', 1))
    with pytest.raises(VerificationError, match="changed after it was written"):
        drift_merge.load_prior(copy)


def test_shards_of_another_prior_are_refused(toy, tmp_path):
    other = make_toy(tmp_path, dtype="bfloat16")
    copy = shutil.copytree(toy.prior.path, tmp_path / "copy")
    shard = "prior-00001-of-00001.safetensors"
    shutil.copy(other.prior.path / shard, copy / shard)
    with pytest.raises(CheckpointError, match="manifest"):
        drift_merge.attach(toy.model(), copy)


def test_a_shard_that_is_cut_short_while_it_is_used_is_an_error_not_a_crash(toy, tmp_path):
    copy = shutil.copytree(toy.prior.path, tmp_path / "copy")
    source = FileDeltas([open_for_training(copy)], [1.0])
    unit = unit_of((24, 16), Origin(0, 0, False))
    read_region(source, unit, Region(flat=(0, 384)))
    shard = copy / "prior-00001-of-00001.safetensors"
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="changed while it was being used"):
        read_region(source, unit, Region(flat=(0, 384)))


def test_priors_of_other_tensors_cannot_be_combined(toy, tmp_path):
    other = make_toy(tmp_path, modules="mlp")
    with pytest.raises(AlignmentError, match="in one of them only, e"):
        drift_merge.attach(toy.model(), [toy.prior, other.prior])


def test_a_block_of_columns_is_read_with_strides(toy):
    out = torch.empty(4, 3)
    module.read_delta(open_for_training(toy.prior), NAME, Block(2, 4, 5, 3), out)
    assert torch.equal(out, toy.deltas()[NAME][2:6, 5:8])


def test_nonfinite_deltas_are_refused(tmp_path, toy):
    from tests import checkpoints as c
    from tests.runs import run_prior
    from tests.training.toys import distinct

    tensors = distinct(c.text_shapes(), 1)
    values = tensors["model.layers.0.mlp.up_proj.weight"].values.copy()
    values[0, 0] = float("nan")
    tensors["model.layers.0.mlp.up_proj.weight"] = c.store(values, "F32")
    c.write_checkpoint(tmp_path / "r", tensors, c.text_config())
    made = run_prior(tmp_path / "r", toy.pair.mllm, tmp_path / "p", allow_nonfinite=True)
    with pytest.raises(CheckpointError, match=r"NaN or Inf.*layers\.0\.mlp\.up_proj"):
        drift_merge.attach(toy.model(), made.prior)
    assert drift_merge.attach(toy.model(), made.prior, modules="attn").coverage.units == 14

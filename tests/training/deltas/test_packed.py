"""Packed bytes, expanded, are what the files hold, whatever the region, origin and codes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.training.deltas import packed
from drift_merge.training.deltas.files import FileDeltas
from drift_merge.training.deltas.held import Resident
from drift_merge.training.deltas.opened import open_for_training
from drift_merge.training.deltas.packed import PackedFiles
from drift_merge.training.units import Origin, Region, Unit
from tests.strategies import few
from tests.training.toys import make_toy, read_region

NAME = "layers.0.mlp.up_proj.weight"  # (24, 16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}
    for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        toy = make_toy(tmp_path_factory.mktemp(dtype), dtype=dtype, modules="mlp", layers=1)
        made[dtype] = open_for_training(toy.prior)
    mixed = FileDeltas([made["bfloat16"], made["int8"]], [1.5, -0.5])
    return {"mixed": mixed} | {name: FileDeltas([one], [1.0]) for name, one in made.items()}


@few
@given(st.data())
def test_every_region_of_every_origin_is_expanded_to_what_the_files_hold(sources, data):
    source = sources[data.draw(st.sampled_from(sorted(sources)))]
    is_transposed = data.draw(st.booleans())
    step = 1 if is_transposed else data.draw(st.integers(1, 3))
    rows = data.draw(st.integers(1, (16 if is_transposed else 24) // step))
    cols = data.draw(st.integers(1, 24 if is_transposed else 16))
    unit = Unit(NAME, "p", None, "mlp", 0, (rows, cols), 0, Origin(0, 0, is_transposed, step))
    begin = data.draw(st.integers(0, unit.numel))
    regions = [
        Region(flat=(begin, data.draw(st.integers(begin, unit.numel)))),
        Region(slices=(slice(rows // 3, rows), slice(cols // 4, cols))),
    ]
    chunk = data.draw(st.integers(1, 99))
    for region in regions:
        held = Resident.copied(PackedFiles(source), {unit: region}, CPU)
        wanted = read_region(source, unit, region, chunk)
        assert torch.equal(read_region(held, unit, region, chunk), wanted)
    whole = Resident.copied(PackedFiles(source), {unit: Region(flat=(0, unit.numel))}, CPU)
    assert torch.equal(
        whole.rows(unit, rows // 2, rows).float(), source.rows(unit, rows // 2, rows)
    )


def test_several_readers_pack_what_one_does(sources, monkeypatch):
    monkeypatch.setattr(packed, "_PASS", 32)
    unit = Unit(NAME, "p", None, "mlp", 0, (24, 16), 0, Origin(0, 0, False))
    region, packs = Region(flat=(5, 380)), PackedFiles(sources["mixed"])
    size = packs.packing(unit, region).size_bytes
    alone, together = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    packs.pack(unit, region, alone)
    with ThreadPoolExecutor(3) as readers:
        packs.pack(unit, region, together, readers)
    assert torch.equal(alone, together)

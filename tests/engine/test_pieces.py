"""Rectangles and rows as they are read equal those of the tensor in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from drift_merge.engine import pieces
from drift_merge.storage.checkpoint import Checkpoint, open_checkpoint
from drift_merge.storage.mapped import MappedCheckpoint
from tests.checkpoints import random_tensors, text_config, write_checkpoint

SHAPES = {"a": (12, 10), "b": (7, 10)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("one") / "model"
    write_checkpoint(folder, random_tensors(SHAPES, 1), text_config(1))
    return open_checkpoint(str(folder))


@pytest.mark.parametrize("window", [2, 50, 2**20])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("size", "offset", "strides"),
    [
        ((12, 10), 0, (10, 1)),  # as it lies
        ((3, 10), 20, (10, 1)),
        ((5, 4), 33, (10, 1)),  # some columns
        ((4, 10), 10, (30, 1)),  # every third row
        ((10, 12), 0, (1, 10)),  # turned
        ((3, 5), 14, (1, 20)),
        ((1, 12), 3, (7, 10)),  # a column
        ((12, 1), 3, (10, 1)),
        ((4, 3), 0, (20, 4)),  # apart both ways
        ((0, 10), 0, (10, 1)),
    ],
)
def test_a_rectangle_is_that_of_the_tensor(
    size: tuple[int, int],
    offset: int,
    strides: tuple[int, int],
    dtype: torch.dtype,
    dense: bool,
    window: int,
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "_WINDOW_BYTES", window)
    monkeypatch.setattr(pieces, "_GAP_BYTES", 0)
    monkeypatch.setattr(pieces, "_WASTE", 10**6 if dense else 0)
    with MappedCheckpoint(checkpoint) as mapped:
        info = checkpoint.tensors["a"]
        whole = pieces.read_whole(mapped, info)[0]
        around = torch.full((size[0] + 2, size[1] + 2), 7.0, dtype=dtype)
        out = around[1:-1, 1:-1]
        pieces.read_rectangle(mapped, info, offset, strides, out)
        assert torch.equal(out, whole.as_strided(size, strides, offset).to(dtype))
        out.fill_(7.0)
        assert bool((around == 7.0).all())  # and nothing beside it was written


@pytest.mark.parametrize(
    "rows", [[], [0, 1, 2], [11, 12, 13, 18], [18, 3, 4, 4, 5, 12, 0], [-1, 2, -1]]
)
def test_rows_in_any_order_are_those_of_the_table(rows: Any, checkpoint: Checkpoint) -> None:
    infos = [checkpoint.tensors[name] for name in SHAPES]
    with MappedCheckpoint(checkpoint) as mapped:
        table = torch.cat([pieces.read_whole(mapped, info)[0] for info in infos])
        out = torch.empty(len(rows), 10, dtype=torch.bfloat16)
        pieces.read_rows(mapped, infos, rows, out)
        assert torch.equal(out, table[torch.tensor(rows, dtype=torch.int64).clamp(min=0)])

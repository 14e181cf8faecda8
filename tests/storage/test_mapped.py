import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import Checkpoint, open_checkpoint
from drift_merge.storage.mapped import MappedCheckpoint
from tests.checkpoints import make_pair, read_tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(str(make_pair(tmp_path, layers=1, num_shards=3).mllm))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_view_holds_the_bytes_of_its_tensor(checkpoint: Checkpoint) -> None:
    assert checkpoint.path is not None
    with MappedCheckpoint(checkpoint) as mapped:
        for name, tensor in read_tensors(checkpoint.path).items():
            info = checkpoint.tensors[name]
            assert bytes(mapped.view(info)) == tensor.data
            assert bytes(mapped.view(info, 2, 6)) == tensor.data[2:6]


def test_a_view_cannot_be_written_to(checkpoint: Checkpoint) -> None:
    with MappedCheckpoint(checkpoint) as mapped:
        assert mapped.view(next(iter(checkpoint.tensors.values()))).readonly


def test_threads_share_one_map_of_each_shard(checkpoint: Checkpoint) -> None:
    before = open_files()
    infos = list(checkpoint.tensors.values())
    with MappedCheckpoint(checkpoint) as mapped, ThreadPoolExecutor(8) as pool:
        views = list(pool.map(lambda info: bytes(mapped.view(info)), infos * 10))
        assert views == [bytes(mapped.view(info)) for info in infos] * 10
        assert open_files() - before == 3
    del views
    assert open_files() == before


def test_a_view_outlives_the_checkpoint_that_gave_it(checkpoint: Checkpoint) -> None:
    info = next(iter(checkpoint.tensors.values()))
    with MappedCheckpoint(checkpoint) as mapped:
        view = mapped.view(info)
        data = bytes(view)
    assert bytes(view) == data


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("by", [-1, 1])
def test_a_shard_of_another_size_is_named_with_both_sizes(
    by: int, is_mapped: bool, checkpoint: Checkpoint
) -> None:
    info = next(iter(checkpoint.tensors.values()))
    path = checkpoint.file(info.shard)
    size = path.stat().st_size
    with MappedCheckpoint(checkpoint) as mapped:
        if is_mapped:
            mapped.view(info)
        os.truncate(path, size + by)
        with pytest.raises(CheckpointError, match="changed while it was being used") as caught:
            mapped.view(info)
    for mention in (info.shard, f"{size:,}", f"{size + by:,}"):
        assert mention in caught.value.message


def test_a_shard_that_is_gone_is_named(checkpoint: Checkpoint) -> None:
    info = next(iter(checkpoint.tensors.values()))
    checkpoint.file(info.shard).unlink()
    with (
        MappedCheckpoint(checkpoint) as mapped,
        pytest.raises(CheckpointError, match=f"{info.shard} cannot be read: No such file"),
    ):
        mapped.view(info)


def test_a_shard_that_is_gone_after_it_was_mapped_is_still_read(checkpoint: Checkpoint) -> None:
    info = next(iter(checkpoint.tensors.values()))
    with MappedCheckpoint(checkpoint) as mapped:
        before = bytes(mapped.view(info))
        checkpoint.file(info.shard).unlink()
        assert bytes(mapped.view(info)) == before


def test_what_is_read_holds_the_bytes_of_its_tensor(checkpoint: Checkpoint) -> None:
    assert checkpoint.path is not None
    with MappedCheckpoint(checkpoint) as mapped:
        for name, tensor in read_tensors(checkpoint.path).items():
            found = bytearray(len(tensor.data) - 2)
            mapped.read(checkpoint.tensors[name], 2, memoryview(found))
            assert found == tensor.data[2:]


def test_a_file_that_ends_early_and_grows_back_is_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = next(iter(checkpoint.tensors.values()))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with (
        MappedCheckpoint(checkpoint) as mapped,
        pytest.raises(CheckpointError, match=f"{info.shard} changed while it was being used"),
    ):
        mapped.read(info, 0, memoryview(bytearray(2)))

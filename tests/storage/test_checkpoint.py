import json
from pathlib import Path

import pytest

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import open_checkpoint
from drift_merge.storage.folder.scan import list_files
from tests.checkpoints import (
    SIDECARS,
    Stored,
    make_pair,
    read_shard,
    read_tensors,
    text_config,
    write_checkpoint,
    write_index,
    write_shard,
)

ONE = {"a": Stored("BF16", (2,), bytes(4))}
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_names_dtypes_shapes_and_places_are_those_on_the_disk(
    num_shards: int, tmp_path: Path
) -> None:
    path = make_pair(tmp_path, layers=1, num_shards=num_shards).mllm
    checkpoint = open_checkpoint(str(path))
    expected = read_tensors(path)
    assert list(checkpoint.tensors) == sorted(expected)
    assert len(checkpoint.shards) == num_shards
    for name, info in checkpoint.tensors.items():
        dtype, shape, data = expected[name]
        assert (info.dtype, info.shape, info.size_bytes) == (dtype, shape, len(data))
        raw = checkpoint.file(info.shard).read_bytes()
        assert raw[info.start : info.start + info.size_bytes] == data
    assert checkpoint.size_bytes == sum(len(tensor.data) for tensor in expected.values())
    assert checkpoint.config["model_type"] == "qwen2_5_vl"


def test_a_single_file_is_opened_without_its_neighbors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", ONE, text_config())
    write_shard(path / "other.safetensors", {"b": ONE["a"]})
    assert list(open_checkpoint(str(path / "other.safetensors")).tensors) == ["b"]
    assert list(open_checkpoint(str(path)).tensors) == ["a"]


def test_shards_without_an_index_are_joined(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", ONE, {})
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    write_shard(path / "model-00002-of-00002.safetensors", {"b": ONE["a"]})
    assert list(open_checkpoint(str(path)).tensors) == ["a", "b"]
    write_shard(path / "model-00002-of-00002.safetensors", ONE)
    with pytest.raises(CheckpointError, match="a is in two shards"):
        open_checkpoint(str(path))


def test_only_shards_that_the_index_names_are_read(tmp_path: Path) -> None:
    path = make_pair(tmp_path, layers=1, num_shards=2).mllm
    before = open_checkpoint(str(path)).tensors
    (path / "consolidated.safetensors").write_bytes(b"broken")
    assert open_checkpoint(str(path)).tensors == before


def test_a_shard_in_a_folder_can_be_named_by_the_index(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", ONE, {})
    (path / "weights").mkdir()
    (path / "model.safetensors").rename(path / "weights" / "a.safetensors")
    write_index(path, {"a": "weights/a.safetensors"})
    assert open_checkpoint(str(path)).tensors["a"].shard == "weights/a.safetensors"


def test_total_size_is_not_believed(tmp_path: Path) -> None:
    path = make_pair(tmp_path, layers=1, num_shards=2).mllm
    index = json.loads((path / INDEX).read_text())
    size = open_checkpoint(str(path)).size_bytes
    for lie in (-1, 10**30, "much", None):
        (path / INDEX).write_text(json.dumps(index | {"metadata": {"total_size": lie}}))
        assert open_checkpoint(str(path)).size_bytes == size


def test_sidecars_are_every_file_but_weights_and_hidden_ones(tmp_path: Path) -> None:
    path = make_pair(tmp_path, layers=1, num_shards=2, mllm_sidecars=SIDECARS).mllm
    for name in (".git/config", ".cache/x.json", "pytorch_model.bin", "original/params.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    assert open_checkpoint(str(path)).sidecars == tuple(sorted([*SIDECARS, "config.json"]))


def test_links_to_files_count_and_links_to_folders_do_not(tmp_path: Path) -> None:
    """The Hub's cache is made of links to files; a link to a folder could lead anywhere."""
    path = write_checkpoint(tmp_path / "m", ONE, {})
    blob = (path / "model.safetensors").rename(tmp_path / "blob")
    (path / "model.safetensors").symlink_to(blob)
    (path / "up").symlink_to(tmp_path)
    (path / "loop").symlink_to("loop")
    assert list_files(path) == ["config.json", "model.safetensors"]
    assert open_checkpoint(str(path)).tensors["a"].size_bytes == 4


def test_a_folder_named_like_the_index_is_no_index(tmp_path: Path) -> None:
    path = make_pair(tmp_path, layers=1, num_shards=2).mllm
    (path / INDEX).unlink()
    (path / INDEX).mkdir()
    assert len(open_checkpoint(str(path)).shards) == 2  # a folder is no file: there is no index


def test_opening_reads_headers_alone(tmp_path: Path) -> None:
    """The data of the shard is a hole of a terabyte."""
    path = write_checkpoint(tmp_path / "m", ONE, {})
    size = 2**40
    header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    assert open_checkpoint(str(path)).size_bytes == size


def test_a_checkpoint_of_empty_tensors_is_not_empty(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", {"a": Stored("BF16", (0, 3), b"")}, {})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.tensors["a"].shape == (0, 3)
    assert checkpoint.size_bytes == 0
    assert read_shard(path / "model.safetensors")["a"].data == b""


def test_a_broken_shard_is_named_together_with_its_checkpoint(tmp_path):
    pair = make_pair(tmp_path)
    file = pair.reasoner / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(pair.reasoner))
    assert caught.value.message.startswith(f"{pair.reasoner}: model.safetensors is truncated")
    assert caught.value.remedy


def test_what_is_no_model_is_refused_before_its_files_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drift_merge.storage.checkpoint.scan", None)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))

import errno
import gc
import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from drift_merge.errors import OutputError
from drift_merge.storage.headers import DTYPE_BITS, parse_header, tensor_bytes
from drift_merge.storage.shards import Entry, ShardLayout, ShardWriter, lay_out, natural_key
from tests.strategies import texts

names = st.builds(
    "{}{}".format,
    st.just("") | st.integers(0, 999).map("layers.{}.".format),
    st.text("abc", min_size=1, max_size=2),
)
kinds = st.tuples(
    st.sampled_from(["BF16", "F32", "U8", "F64", "I16"]), st.lists(st.integers(0, 6), max_size=3)
)
entries = st.dictionaries(names, kinds, min_size=1, max_size=20).map(
    lambda found: [(name, dtype, tuple(shape)) for name, (dtype, shape) in found.items()]
)
limits = st.integers(1, 2000)


def layout_of(some: list[Entry], limit: int = 10**9, **options: Any) -> ShardLayout:
    return lay_out(some, stem="model", max_shard_bytes=limit, metadata={"format": "pt"}, **options)


def data_of(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


@given(entries, limits)
def test_every_tensor_is_in_exactly_one_shard_within_the_limit(
    some: list[Entry], limit: int
) -> None:
    layout = layout_of(some, limit)
    assert sorted(layout.tensors) == sorted(name for name, _, _ in some)
    found: list[str] = []
    for shard in layout.shards:
        raw = shard.header + bytes(shard.file_bytes - len(shard.header))
        header = parse_header(raw, shard=shard.file, file_bytes=shard.file_bytes)
        found += header.tensors
        assert header.tensors == {n: t for n, t in layout.tensors.items() if t.shard == shard.file}
        sizes = [info.size_bytes for info in header.tensors.values()]
        assert sizes, "a shard is empty"
        assert sum(sizes) <= limit or sum(size > 0 for size in sizes) == 1
    assert sorted(found) == sorted(layout.tensors)
    assert layout.size_bytes == sum(shard.file_bytes for shard in layout.shards)


@given(entries, limits, st.randoms(use_true_random=False))
def test_the_order_of_the_entries_changes_no_byte(
    some: list[Entry], limit: int, shuffle: random.Random
) -> None:
    shuffled = list(some)
    shuffle.shuffle(shuffled)
    assert layout_of(shuffled, limit) == layout_of(some, limit)


@given(entries, limits)
def test_data_is_aligned_to_its_dtype(some: list[Entry], limit: int) -> None:
    for info in layout_of(some, limit).tensors.values():
        assert info.start % (DTYPE_BITS[info.dtype] // 8) == 0


@given(entries, limits)
def test_the_index_says_where_every_tensor_is(some: list[Entry], limit: int) -> None:
    layout = layout_of(some, limit)
    if len(layout.shards) == 1:
        assert layout.index is None
        assert layout.shards[0].file == "model.safetensors"
        return
    assert layout.index is not None
    name, data = layout.index
    index = json.loads(data)
    assert name == "model.safetensors.index.json"
    assert index["weight_map"] == {n: info.shard for n, info in layout.tensors.items()}
    total = sum(tensor_bytes(dtype, shape) for _, dtype, shape in some)
    assert index["metadata"] == {"total_size": total}
    count = len(layout.shards)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [shard.file for shard in layout.shards] == files


def test_one_shard_can_be_numbered_and_indexed() -> None:
    layout = layout_of([("a", "F32", (2,))], always_numbered=True)
    assert [shard.file for shard in layout.shards] == ["model-00001-of-00001.safetensors"]
    assert layout.index is not None


def test_layer_2_comes_before_layer_10() -> None:
    some = [(f"layers.{i}.w", "F32", (1,)) for i in (10, 2, 1, 0)]
    assert list(layout_of(some).tensors) == [f"layers.{i}.w" for i in (0, 1, 2, 10)]


@given(st.lists(texts(max_size=8) | names, unique=True))
def test_no_two_names_share_a_place_in_the_order(some: list[str]) -> None:
    keys = [natural_key(name) for name in some]
    assert len({repr(key) for key in keys}) == len(some)
    turned = some[::-1]
    assert sorted(some, key=natural_key) == sorted(turned, key=natural_key)


@pytest.mark.parametrize("name", ["x²", "x٣", "w" + "9" * 5000, "1.01", "1.1", "", "007"])
def test_strange_digits_in_a_name_are_ordered_all_the_same(name: str) -> None:
    some = [(name, "F32", (1,)), ("x3", "F32", (1,)), ("1.001", "F32", (1,))]
    assert layout_of(some) == layout_of(some[::-1])


SOME: list[Entry] = [
    ("a", "BF16", (3, 5)),
    ("b", "F32", (2, 2)),
    ("c", "U8", (7,)),
    ("empty", "F32", (0, 4)),
    ("scalar", "F64", ()),
    ("z", "BF16", (40,)),
]


def fill(writer: ShardWriter) -> None:
    for name, info in writer.layout.tensors.items():
        writer.write(info, 0, data_of(name, info.size_bytes))


def assert_filled(directory: Path, layout: ShardLayout) -> None:
    assert sorted(os.listdir(directory)) == sorted(shard.file for shard in layout.shards)
    found: dict[str, Any] = {}
    for shard in layout.shards:
        raw = (directory / shard.file).read_bytes()
        assert len(raw) == shard.file_bytes
        found |= dict(safetensors.deserialize(raw))
    for name, info in layout.tensors.items():
        assert found[name]["dtype"] == info.dtype
        assert tuple(found[name]["shape"]) == info.shape
        assert found[name]["data"] == data_of(name, info.size_bytes)
    assert found.keys() == layout.tensors.keys()


@pytest.mark.parametrize("limit", [10, 60, 10**6])
def test_the_library_reads_what_was_written(limit: int, tmp_path: Path) -> None:
    layout = layout_of(SOME, limit)
    with ShardWriter(layout, tmp_path) as writer:
        fill(writer)
        writer.flush()
    assert_filled(tmp_path, layout)


def test_threads_may_write_pieces_in_any_order(tmp_path: Path) -> None:
    layout = layout_of(SOME, 60)
    pieces = [(info, at) for info in layout.tensors.values() for at in range(info.size_bytes)]
    random.Random(0).shuffle(pieces)
    with ShardWriter(layout, tmp_path) as writer, ThreadPoolExecutor(8) as pool:
        for write in [
            pool.submit(writer.write, info, at, data_of(info.name, info.size_bytes)[at : at + 1])
            for info, at in pieces
        ]:
            write.result()
    assert_filled(tmp_path, layout)


def test_what_was_written_survives_reopening(tmp_path: Path) -> None:
    layout = layout_of(SOME, 60)
    with ShardWriter(layout, tmp_path) as writer:
        fill(writer)
    with ShardWriter(layout, tmp_path):
        pass
    assert_filled(tmp_path, layout)


def test_a_file_of_another_size_is_brought_to_its_size(tmp_path: Path) -> None:
    layout = layout_of(SOME, 60)
    for shard, size in zip(layout.shards, (0, 10**5), strict=False):
        (tmp_path / shard.file).write_bytes(b"x" * size)
    with ShardWriter(layout, tmp_path) as writer:
        fill(writer)
    assert_filled(tmp_path, layout)


def test_shards_of_another_layout_are_removed(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00009.safetensors").write_bytes(b"old")
    layout = layout_of(SOME)
    with ShardWriter(layout, tmp_path) as writer:
        fill(writer)
    assert_filled(tmp_path, layout)


def test_a_failed_flush_is_never_followed_by_one_that_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports lost pages once; the second call would say that all is well."""

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with ShardWriter(layout_of(SOME), tmp_path) as writer:
        fill(writer)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(OutputError, match=r"model\.safetensors cannot be written"):
                writer.flush()
        with pytest.raises(OutputError, match=r"model\.safetensors cannot be written"):
            writer.flush()


def test_a_write_of_nothing_is_an_error_not_an_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(layout_of(SOME), tmp_path) as writer:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(OutputError, match="nothing was written"):
            fill(writer)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EACCES, "may write to"),
        (errno.EROFS, "may write to"),
        (errno.EIO, "Check the disk"),
    ],
)
def test_every_failure_has_its_remedy(
    number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with ShardWriter(layout_of(SOME), tmp_path) as writer:
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match=r"model\.safetensors") as caught:
            fill(writer)
    assert remedy in caught.value.remedy


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    layout = layout_of(SOME, 10)
    with ShardWriter(layout, tmp_path):
        assert len(os.listdir("/proc/self/fd")) == before + len(layout.shards) > before + 2
    last = tmp_path / layout.shards[-1].file
    last.unlink()
    last.mkdir()
    with pytest.raises(OutputError, match="Is a directory"), ShardWriter(layout, tmp_path):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_disk_is_asked_only_for_what_is_not_reserved_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of([("a", "U8", (100_000,))])
    with ShardWriter(layout, tmp_path):
        pass
    real = os.statvfs(tmp_path)
    full = os.statvfs_result([512, 512, *real[2:4], 3, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with ShardWriter(layout, tmp_path):
        pass
    (tmp_path / "model.safetensors").unlink()
    with (
        pytest.raises(OutputError, match="1,536 are free"),
        ShardWriter(layout, tmp_path),
    ):
        pass


def test_more_shards_than_files_are_written_by_threads_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drift_merge.storage.shards.share_of_files", lambda _: 2)
    layout = layout_of([(f"t{i}", "U8", (40,)) for i in range(30)], 40)
    assert len(layout.shards) == 30
    gc.collect()  # files of other tests
    before = len(os.listdir("/proc/self/fd"))
    pieces = [(info, at) for info in layout.tensors.values() for at in range(0, 40, 4)]
    random.Random(0).shuffle(pieces)
    with ShardWriter(layout, tmp_path) as writer, ThreadPoolExecutor(8) as pool:
        for write in [
            pool.submit(writer.write, info, at, data_of(info.name, 40)[at : at + 4])
            for info, at in pieces
        ]:
            write.result()
        writer.flush()
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert_filled(tmp_path, layout)
    assert len(os.listdir("/proc/self/fd")) == before


def test_data_that_is_lost_when_a_file_makes_room_fails_every_later_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("drift_merge.storage.shards.share_of_files", lambda _: 2)
    layout = layout_of([(f"t{i}", "U8", (40,)) for i in range(3)], 40)
    with ShardWriter(layout, tmp_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(OutputError, match="Input/output error"):
                fill(writer)
        with pytest.raises(OutputError, match="Input/output error"):
            writer.flush()


@given(st.dictionaries(texts(min_size=1, max_size=20), kinds, min_size=1, max_size=8))
def test_an_index_is_as_json_writes_it(found: dict[str, tuple[str, list[int]]]) -> None:
    some = [(name, dtype, tuple(shape)) for name, (dtype, shape) in found.items()]
    layout = layout_of(some, always_numbered=True)
    assert layout.index is not None
    text = layout.index[1].decode()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    assert json.loads(text)["weight_map"].keys() == found.keys()

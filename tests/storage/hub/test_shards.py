"""Single shards over a line that cuts, lies and stutters; against a real server on loopback."""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from drift_merge.errors import OutputError, SourceError
from drift_merge.storage.headers import read_header
from drift_merge.storage.hub import ranges
from drift_merge.storage.hub.models import fetch_snapshot
from drift_merge.storage.hub.ranges import DownloadCancelled, fetch_ranges, join_ranges
from drift_merge.storage.hub.shards import fetch_sidecars, fetch_whole, find_remote, is_whole
from drift_merge.storage.sources import RemoteShard, Source
from tests import checkpoints as c
from tests.hub_server.client import impatient
from tests.hub_server.server import HubServer

REPO = "org/name"
FILE = "model-00001-of-00002.safetensors"
SIZE = 1_000_000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with impatient(tmp_path / "home", monkeypatch) as server:
        yield server


@pytest.fixture
def folder(hub: HubServer, tmp_path: Path) -> Path:
    """A repository of two shards, each of ten tensors of 100 kB."""
    shape = (SIZE // 10,)
    names = [f"layers.{i}.weight" for i in range(20)]
    tensors = {name: c.Stored("U8", shape, os.urandom(SIZE // 10)) for name in names}
    folder = c.write_checkpoint(
        tmp_path / "model", tensors, {}, num_shards=2, sidecars={"tokenizer.json": b"{}"}
    )
    hub.add_commit(REPO, folder)
    return folder


def pinned(hub: HubServer) -> Source:
    commit = hub.repos[REPO].refs["main"]
    return Source(given=REPO, kind="hub", repo_id=REPO, revision=commit)


def located(hub: HubServer, folder: Path) -> RemoteShard:
    headers = {path.name: read_header(path, path.name) for path in folder.glob("*.safetensors")}
    remote = find_remote(pinned(hub), headers, with_digests=True)[1]
    assert set(remote) == set(headers)
    hub.forget_requests()
    return remote[FILE]


def nothing(_: int) -> None:
    pass


def test_shards_are_located_with_their_sizes_and_hashes(hub: HubServer, folder: Path) -> None:
    shard = located(hub, folder)
    data = (folder / FILE).read_bytes()
    assert (shard.repo_id, shard.revision, shard.file) == (REPO, pinned(hub).revision, FILE)
    assert shard.file_bytes == len(data)
    assert shard.digest == hashlib.sha256(data).hexdigest()


def test_shards_in_the_users_cache_are_not_remote(hub: HubServer, folder: Path) -> None:
    snapshot = fetch_snapshot(pinned(hub), quiet=True).path
    headers = {path.name: read_header(path, path.name) for path in folder.glob("*.safetensors")}
    (snapshot / FILE).unlink()
    path, remote = find_remote(pinned(hub), headers, with_digests=True)
    assert path == snapshot
    assert set(remote) == {FILE}


def test_a_whole_shard_arrives_below_the_directory_and_nowhere_else(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    shard, arrived = located(hub, folder), []
    path = fetch_whole(shard, tmp_path / "shards", arrived.append)
    assert path == tmp_path / "shards" / shard.place
    assert path.read_bytes() == (folder / FILE).read_bytes()
    assert sum(arrived) == shard.file_bytes == hub.bytes_sent("GET /lfs/")
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_shard_that_is_there_is_not_fetched_again_and_a_damaged_one_is(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    shard = located(hub, folder)
    path = fetch_whole(shard, tmp_path, nothing)
    hub.forget_requests()
    assert fetch_whole(shard, tmp_path, nothing) == path
    assert hub.requests() == []
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    assert not is_whole(shard, path)
    fetch_whole(shard, tmp_path, nothing)
    assert is_whole(shard, path)


@pytest.mark.parametrize("chunks", range(1, 8))
def test_a_connection_that_is_cut_every_few_chunks_delivers_the_same_bytes(
    hub: HubServer, folder: Path, tmp_path: Path, chunks: int
) -> None:
    shard = located(hub, folder)
    hub.inject("GET /lfs/", cut_after=65_536 * chunks)
    path = fetch_whole(shard, tmp_path, nothing)
    assert path.read_bytes() == (folder / FILE).read_bytes()
    # huggingface_hub gives up, since none of its chunks of 10 MB arrives; ours lose no byte.
    ours = [exchange for exchange in hub.requests("GET /lfs/") if exchange.range]
    assert sum(exchange.bytes_sent for exchange in ours) >= shard.file_bytes


@pytest.mark.parametrize("where", ["HEAD .*resolve", "GET /lfs/"])
@pytest.mark.parametrize("status", [429, 503])
def test_an_answer_that_passes_is_waited_out(
    hub: HubServer, folder: Path, tmp_path: Path, where: str, status: int
) -> None:
    shard = located(hub, folder)
    hub.inject(where, status=status, times=3)
    assert is_whole(shard, fetch_whole(shard, tmp_path, nothing))


def test_an_answer_that_does_not_pass_is_given_up_with_a_remedy(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    shard = located(hub, folder)
    hub.inject("GET /lfs/", status=503)
    with pytest.raises(SourceError, match="HTTP 503") as caught:
        fetch_whole(shard, tmp_path, nothing)
    assert "Finished parts are kept" in caught.value.remedy
    assert len(hub.requests("GET /lfs/")) == 2 + len(ranges.WAITS_SECONDS)


def test_wrong_bytes_are_fetched_again(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    shard = located(hub, folder)
    hub.inject("GET /lfs/", body=bytes(shard.file_bytes), times=2)
    assert is_whole(shard, fetch_whole(shard, tmp_path, nothing))


def test_bytes_that_are_always_wrong_are_an_error_and_do_not_stay(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    shard = located(hub, folder)
    hub.inject("GET /lfs/", body=bytes(shard.file_bytes))
    with pytest.raises(SourceError, match=f"{FILE} of {REPO}.* 3 times with wrong bytes") as caught:
        fetch_whole(shard, tmp_path, nothing)
    assert str(shard.digest) in caught.value.message
    assert caught.value.exit_code == 3
    assert not list(tmp_path.glob("*@*/*.safetensors"))


def test_a_small_shard_that_the_hub_keeps_in_git_is_compared_with_gits_hash(
    tmp_path: Path,
) -> None:
    data = os.urandom(1000)
    (tmp_path / "a").write_bytes(data)
    digest = hashlib.sha1(b"blob 1000\0" + data).hexdigest()
    shard = RemoteShard(REPO, "0" * 40, "a", 1000, digest)
    assert is_whole(shard, tmp_path / "a")
    (tmp_path / "a").write_bytes(data[::-1])
    assert not is_whole(shard, tmp_path / "a")


def test_a_download_that_nobody_waits_for_ends(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = located(hub, folder)

    def stop(_: int) -> None:
        raise DownloadCancelled

    for fetch in (
        lambda: fetch_whole(shard, tmp_path, stop),
        lambda: fetch_ranges(shard, [(0, SIZE)], tmp_path / "part", stop),
    ):
        with pytest.raises(DownloadCancelled):
            fetch()
    assert not list(tmp_path.rglob("*.incomplete"))


def test_ranges_arrive_at_their_own_offsets_and_nothing_else_does(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    shard, data, arrived = located(hub, folder), (folder / FILE).read_bytes(), []
    ranges = [(1000, 300_000), (600_000, 600_001), (shard.file_bytes - 10, shard.file_bytes)]
    path = tmp_path / "deep" / "part"
    fetch_ranges(shard, ranges, path, arrived.append)
    expected = bytearray(len(data))
    for begin, end in ranges:
        expected[begin:end] = data[begin:end]
    assert path.read_bytes() == expected
    assert sum(arrived) == hub.bytes_sent("GET /lfs/") == sum(end - begin for begin, end in ranges)


@pytest.mark.parametrize("cut_after", [7_000, 65_536, 200_000])
def test_a_range_that_is_cut_goes_on_where_it_was_cut(
    hub: HubServer, folder: Path, tmp_path: Path, cut_after: int
) -> None:
    shard = located(hub, folder)
    hub.inject("GET /lfs/", cut_after=cut_after)
    fetch_ranges(shard, [(17, SIZE)], tmp_path / "part", nothing)
    assert (tmp_path / "part").read_bytes()[17:SIZE] == (folder / FILE).read_bytes()[17:SIZE]
    assert hub.bytes_sent("GET /lfs/") == SIZE - 17


def test_a_range_survives_answers_that_pass_and_gives_up_on_others(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    shard = located(hub, folder)
    fault = hub.inject("GET /lfs/", status=503, times=4)
    fetch_ranges(shard, [(0, 5000)], tmp_path / "part", nothing)
    fault.times = 1000
    with pytest.raises(SourceError, match="HTTP 503"):
        fetch_ranges(shard, [(0, 5000)], tmp_path / "other", nothing)
    assert not (tmp_path / "other").exists()


def test_an_answer_that_is_not_the_range_asked_for_is_refused(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    shard = located(hub, folder)
    hub.inject("GET /lfs/", ignore_range=True)
    with pytest.raises(SourceError, match=r"expected bytes 1000-.*, got no range"):
        fetch_ranges(shard, [(1000, 5000)], tmp_path / "part", nothing)


def test_a_file_of_another_size_is_refused(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    shard = located(hub, folder)
    other = RemoteShard(REPO, shard.revision, FILE, shard.file_bytes + 1, None)
    with pytest.raises(SourceError, match=f"expected {shard.file_bytes + 1} bytes in all"):
        fetch_ranges(other, [(1000, 5000)], tmp_path / "part", nothing)


@pytest.mark.parametrize("kind", ["whole", "ranges"])
def test_a_full_disk_is_an_output_error_that_speaks_of_the_limit(
    hub: HubServer, folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = located(hub, folder)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fetch() -> None:
        if kind == "whole":
            fetch_whole(shard, tmp_path, nothing)
        else:
            fetch_ranges(shard, [(0, 5000)], tmp_path / "part", nothing)

    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", full)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left") as caught:
        fetch()
    assert caught.value.exit_code == 6
    assert "--cache-limit" in caught.value.remedy
    assert not (tmp_path / "part.incomplete").exists()


@pytest.mark.parametrize(
    ("wanted", "joined"),
    [
        ([], ()),
        ([(5, 9), (0, 5)], ((0, 9),)),
        ([(0, 4), (6, 9)], ((0, 9),)),
        ([(0, 4), (7, 9)], ((0, 4), (7, 9))),
        ([(0, 9), (1, 2)], ((0, 9),)),
    ],
)
def test_ranges_that_almost_touch_are_joined(
    wanted: list[tuple[int, int]],
    joined: tuple[tuple[int, int], ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranges, "GAP_BYTES", 2)
    assert join_ranges(wanted) == joined


def test_sidecars_go_to_the_users_cache_and_shards_do_not(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    fetch_sidecars(pinned(hub), ["config.json", "tokenizer.json"])
    found = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert found == {"config.json", "tokenizer.json"}
    fetch_sidecars(pinned(hub), [])

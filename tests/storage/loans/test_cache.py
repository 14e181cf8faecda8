"""Leases of shards: order, limit, deletion, failure; downloads are faked here."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from drift_merge.errors import OutputError, SourceError
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.hub.ranges import Count
from drift_merge.storage.loans import cache, fetchers, leases
from drift_merge.storage.loans.cache import ShardCache
from drift_merge.storage.loans.leases import Lease, ShardRequest, shard_request
from drift_merge.storage.sources import RemoteShard

DEADLINE_SECONDS = 10


def shard(name: str, size: int = 1) -> RemoteShard:
    return RemoteShard("org/name", "0" * 40, name, size)


def lease(name: str, uses: int = 1, size: int = 1, again: int = 0) -> Lease:
    return Lease(ShardRequest(shard(name, size), ()), uses, again)


def eventually(claim: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not claim():
        assert time.monotonic() < end
        time.sleep(0.002)


class Line:
    """A fake of the Hub that delivers a shard when it may."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.blocked: set[str] = set()
        self.errors: dict[str, BaseException] = {}

    def fetch(self, wanted: RemoteShard, directory: Path, count: Count) -> Path:
        self.fetched.append(wanted.file)
        eventually(lambda: wanted.file not in self.blocked or bool(count(0)))
        if wanted.file in self.errors:
            raise self.errors[wanted.file]
        count(wanted.file_bytes)
        path = directory / wanted.place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * wanted.file_bytes)
        return path


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    fake = Line()
    monkeypatch.setattr(fetchers, "can_fork", lambda: False)
    monkeypatch.setattr(fetchers, "fetch_whole", fake.fetch)
    monkeypatch.setattr(fetchers, "is_whole", lambda shard, path: path.is_file())
    monkeypatch.setattr(cache, "_FAREWELL_SECONDS", 1.0)
    yield fake
    fake.blocked.clear()


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def test_shards_come_in_order_stay_while_they_are_needed_and_go(line: Line, tmp_path: Path) -> None:
    leases = [lease("a", 2), lease("b"), lease("c")]
    tickets = {"first": (0,), "second": (0, 1), "third": (2,)}
    with ShardCache(tmp_path / "shards", leases, tickets, limit_bytes=2) as cache:
        cache.start()
        with cache.borrow("first"):
            assert cache.path(shard("a")).read_bytes() == b"x"
        eventually(lambda: len(line.fetched) == 2)
        with cache.borrow("second"):
            assert files(cache.directory) == {"a", "b"}
        with cache.borrow("third"):
            assert files(cache.directory) == {"c"}
        assert files(cache.directory) == set()
    assert sorted(line.fetched[:2]) == ["a", "b"]
    assert line.fetched[2] == "c"
    assert not (tmp_path / "shards").exists()
    assert (cache.traffic.num_downloads, cache.traffic.peak_bytes) == (3, 2)
    assert cache.traffic.downloaded_bytes == 3


def test_the_next_shard_comes_while_work_goes_on_and_no_more_than_fit(
    line: Line, tmp_path: Path
) -> None:
    leases = [lease(name, size=5) for name in "abc"]
    tickets = {name: (number,) for number, name in enumerate("abc")}
    with ShardCache(tmp_path / "s", leases, tickets, limit_bytes=11) as cache:
        cache.start()
        with cache.borrow("a"):
            eventually(lambda: files(cache.directory) == {"a", "b"})
            time.sleep(0.05)
            assert line.fetched == ["a", "b"] or line.fetched == ["b", "a"]
        for name in "bc":
            with cache.borrow(name):
                pass
    assert cache.traffic.peak_bytes == 10


def test_a_shard_is_let_go_of_before_it_is_deleted(line: Line, tmp_path: Path) -> None:
    seen = []
    with ShardCache(tmp_path / "s", [lease("a")], {"a": (0,)}, limit_bytes=1) as cache:
        cache.start()
        cache.on_evict = lambda gone: seen.append((gone.file, cache.path(gone).exists()))
        with cache.borrow("a"):
            pass
    assert seen == [("a", True)]


def test_several_workers_may_use_a_lease_and_the_last_one_ends_it(
    line: Line, tmp_path: Path
) -> None:
    with ShardCache(tmp_path / "s", [lease("a", 3)], {"a": (0,)}, limit_bytes=1) as cache:
        cache.start()
        with ExitStack() as stack:
            stack.enter_context(cache.borrow("a"))
            stack.enter_context(cache.borrow("a", uses=2))
            assert files(cache.directory) == {"a"}
        assert files(cache.directory) == set()


def test_a_shard_that_went_away_comes_again_and_is_counted(line: Line, tmp_path: Path) -> None:
    leases = [lease("a"), lease("b"), lease("a", again=1)]
    tickets = {1: (0,), 2: (1,), 3: (2,)}
    with ShardCache(tmp_path / "s", leases, tickets, limit_bytes=1) as cache:
        cache.start()
        for ticket in tickets:
            with cache.borrow(ticket):
                pass
    assert line.fetched == ["a", "b", "a"]
    assert (cache.traffic.num_downloads, cache.traffic.again_bytes) == (3, 1)


def test_a_shard_that_would_come_again_stays_if_there_is_room_after_all(
    line: Line, tmp_path: Path
) -> None:
    leases = [lease("a"), lease("b"), lease("a")]
    tickets = {1: (0,), 2: (1,), 3: (2,)}
    with ShardCache(tmp_path / "s", leases, tickets, limit_bytes=2) as cache:
        cache.start()
        with cache.borrow(1):
            eventually(lambda: cache._next == 3)
        assert "a" in files(cache.directory)
        for ticket in (2, 3):
            with cache.borrow(ticket):
                pass
        assert files(cache.directory) == set()
    assert sorted(line.fetched) == ["a", "b"]


def test_a_lease_that_is_passed_by_is_not_fetched_or_ends_at_once(
    line: Line, tmp_path: Path
) -> None:
    line.blocked = {"a"}
    leases, tickets = [lease("a"), lease("b"), lease("c")], {"a": (0,), "b": (1,), "c": (2,)}
    with ShardCache(tmp_path / "s", leases, tickets, limit_bytes=1) as cache:
        cache.start()
        eventually(lambda: line.fetched == ["a"])
        cache.give_back("a")
        cache.give_back("b")
        line.blocked.clear()
        with cache.borrow("c"):
            assert files(cache.directory) == {"c"}
    assert line.fetched == ["a", "c"]


def test_a_ticket_that_is_not_known_needs_nothing(line: Line, tmp_path: Path) -> None:
    with ShardCache(tmp_path / "s", [lease("a")], {"a": (0,)}, limit_bytes=1) as cache:
        cache.start()
        with cache.borrow("other"):
            pass


def test_work_on_what_is_here_goes_on_when_a_later_download_fails(
    line: Line, tmp_path: Path
) -> None:
    line.errors["b"] = SourceError("gone")
    leases, tickets = [lease("a", 2), lease("b")], {"a": (0,), "b": (0, 1)}
    cache = ShardCache(tmp_path / "s", leases, tickets, limit_bytes=2)

    def run() -> None:
        with cache:
            cache.start()
            eventually(lambda: cache._error is not None)
            with cache.borrow("a"):
                pass
            with cache.borrow("b"):
                raise AssertionError("b never came")

    with pytest.raises(SourceError, match="gone"):
        run()
    assert files(tmp_path / "s") == {"a"}  # for the next run, which resumes


def test_a_lease_that_is_never_granted_after_a_failure_is_not_waited_for(
    line: Line, tmp_path: Path
) -> None:
    line.errors["b"] = SourceError("gone")
    leases, tickets = [lease("a", 2), lease("b"), lease("a")], {"a": (0,), "later": (2,)}
    cache = ShardCache(tmp_path / "s", leases, tickets, limit_bytes=2)

    def run() -> None:
        with cache:
            cache.start()
            eventually(lambda: cache._error is not None)
            cache._next = 2  # a is here by its first lease; its second one was never granted
            with cache.borrow("later"):
                raise AssertionError("the lease was never granted")

    with pytest.raises(SourceError, match="gone"):
        run()


def test_a_waiting_worker_gives_up_when_it_is_told_to(line: Line, tmp_path: Path) -> None:
    line.blocked = {"a"}
    told = threading.Event()

    def check() -> None:
        if told.is_set():
            raise KeyboardInterrupt

    def run() -> None:
        with ShardCache(tmp_path / "s", [lease("a")], {"a": (0,)}, limit_bytes=1) as cache:
            cache.start()
            threading.Timer(0.05, told.set).start()
            with cache.borrow("a", check=check):
                raise AssertionError("a never came")

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert time.monotonic() - started < DEADLINE_SECONDS / 2
    assert not (tmp_path / "s").exists()


def test_what_an_interrupted_run_left_is_used_and_the_rest_of_it_deleted(
    line: Line, tmp_path: Path
) -> None:
    directory = tmp_path / "s"
    here, far = shard("a"), shard("c")
    for each in (here, far, shard("stranger")):
        path = directory / each.place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (directory / "x.incomplete").write_bytes(b"x")
    leases, tickets = [lease(n) for n in "abc"], {name: (i,) for i, name in enumerate("abc")}
    with ShardCache(directory, leases, tickets, limit_bytes=2) as cache:
        cache.start()
        for name in "abc":
            with cache.borrow(name):
                assert len(files(directory)) <= 2
    # c would have broken the limit while a and b were here.
    assert sorted(line.fetched) == ["b", "c"]
    assert (cache.traffic.num_kept, cache.traffic.num_downloads) == (1, 2)


def test_a_directory_that_cannot_be_made_is_an_output_error(line: Line, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        ShardCache(tmp_path / "file" / "s", [lease("a")], {}, limit_bytes=1) as cache,
        pytest.raises(OutputError, match="cannot be written"),
    ):
        cache.start()


def test_a_shard_is_needed_in_part_where_less_than_half_of_a_large_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("drift_merge.storage.hub.ranges.GAP_BYTES", 0)
    monkeypatch.setattr(leases, "WORTH_PARTING_BYTES", 100)

    def info(start: int, size: int) -> TensorInfo:
        return TensorInfo("x", "U8", (size,), "a", start, size)

    large = shard("a", 100)
    part = shard_request(large, [info(60, 20), info(10, 20), info(30, 5)])
    assert part == ShardRequest(large, ((10, 35), (60, 80)))
    assert part.size_bytes == 45
    assert part.place.startswith(large.place)
    assert shard_request(large, [info(10, 50)]) == ShardRequest(large, ())
    assert shard_request(shard("a", 99), [info(10, 1)]) == ShardRequest(shard("a", 99), ())
    assert shard_request(large, [info(10, 0)]) == ShardRequest(large, ())


def test_two_parts_of_one_shard_are_never_here_together(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(_: RemoteShard, ranges: object, path: Path, count: Count) -> None:
        line.fetched.append(str(ranges))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    monkeypatch.setattr(fetchers, "fetch_ranges", fetch)
    large = shard("a", 100)
    leases = [Lease(ShardRequest(large, ((0, 5),)), 1), Lease(ShardRequest(large, ((5, 9),)), 1)]
    with ShardCache(tmp_path / "s", leases, {1: (0,), 2: (1,)}, limit_bytes=100) as cache:
        cache.start()
        with cache.borrow(1):
            time.sleep(0.05)
            assert line.fetched == ["((0, 5),)"]
            assert covers(cache, large, 0, 5)
            assert not covers(cache, large, 5, 4)
        with cache.borrow(2):
            assert covers(cache, large, 5, 4)
            assert not covers(cache, large, 0, 5)
            assert len(files(cache.directory)) == 1
    assert (cache.traffic.num_downloads, cache.traffic.num_parts) == (2, 2)


def covers(cache: ShardCache, wanted: RemoteShard, start: int, size: int) -> bool:
    return cache.covers(wanted, TensorInfo("x", "U8", (size,), "a", start, size))


def test_a_part_covers_its_tensors_and_no_others(line: Line, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, [], {}, limit_bytes=200)
    large = shard("a", 100)
    cache._take(ShardRequest(large, ((10, 35), (60, 80))))
    cache._take(ShardRequest(shard("b", 50), ()))
    assert covers(cache, large, 10, 25)
    assert covers(cache, large, 70, 10)
    assert not covers(cache, large, 9, 5)
    assert not covers(cache, large, 30, 35)
    assert covers(cache, shard("b", 50), 0, 50)
    assert not covers(cache, shard("c"), 0, 1)

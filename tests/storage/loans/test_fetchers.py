"""Downloads in a process of their own: what comes back from it, and how it ends."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drift_merge.errors import OutputError, SourceError
from drift_merge.storage.hub.ranges import Count, DownloadCancelled
from drift_merge.storage.loans import fetchers
from drift_merge.storage.loans.fetchers import Fetcher
from drift_merge.storage.loans.leases import ShardRequest
from drift_merge.storage.sources import RemoteShard

NEED = ShardRequest(RemoteShard("org/name", "0" * 40, "a", 5_000_000), ())
Make = Callable[..., Fetcher]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A fetcher whose process does what it is given in the place of a download."""
    made: list[Fetcher] = []

    def fetcher(
        fetch: Callable[[Count], None], count: Callable[[int], None] = lambda _: None
    ) -> Fetcher:
        def fake(_: RemoteShard, directory: Path, arrived: Count) -> Path:
            fetch(arrived)
            return directory

        monkeypatch.setattr(fetchers, "fetch_whole", fake)
        made.append(Fetcher(tmp_path, count))
        return made[-1]

    yield fetcher
    for each in made:
        if not each._is_ended:
            each.end()


def test_bytes_are_counted_to_the_last_one_in_few_messages(make: Make) -> None:
    counts: list[int] = []

    def download(count: Count) -> None:
        for _ in range(1000):
            count(5_000)

    assert make(download, counts.append).fetch(NEED) is False
    assert sum(counts) == 5_000_000
    assert len(counts) < 10


def test_what_is_there_is_not_fetched(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetchers, "is_whole", lambda shard, path: True)
    assert make(lambda count: os.abort()).fetch(NEED) is True


def test_a_part_that_has_its_name_is_there(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = ShardRequest(NEED.shard, ((0, 5),))
    (tmp_path / part.place).parent.mkdir(parents=True)
    (tmp_path / part.place).touch()
    assert make(lambda count: os.abort()).fetch(part) is True


@pytest.mark.parametrize("kind", [SourceError, OutputError])
def test_errors_arrive_with_their_remedy_and_the_next_download_is_possible(
    kind: type[SourceError], make: Make, tmp_path: Path
) -> None:
    def download(count: Count) -> None:
        if not (tmp_path / "before").exists():
            (tmp_path / "before").touch()
            raise kind("it failed", remedy="try again")

    fetcher = make(download)
    with pytest.raises(kind, match="it failed") as caught:
        fetcher.fetch(NEED)
    assert caught.value.remedy == "try again"
    assert fetcher.fetch(NEED) is False


def test_a_bug_arrives_with_its_traceback(make: Make) -> None:
    def download(count: Count) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        make(download).fetch(NEED)
    assert "in download" in str(caught.value.__cause__)


def test_a_process_that_dies_is_a_source_error_that_names_the_shard(make: Make) -> None:
    def download(count: Count) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(SourceError, match="fetching a has ended without a word") as caught:
        make(download).fetch(NEED)
    assert "resumes" in caught.value.remedy


def test_a_download_is_ended_at_once_wherever_it_hangs(make: Make) -> None:
    lists = Path("/proc/self/task").glob("*/children")
    before = {n for path in lists for n in path.read_text().split()}
    fetcher = make(lambda count: time.sleep(60))
    found: list[BaseException] = []

    def run() -> None:
        try:
            fetcher.fetch(NEED)
        except DownloadCancelled as error:
            found.append(error)

    thread = threading.Thread(target=run)
    started = time.monotonic()
    thread.start()
    time.sleep(0.05)
    fetcher.end()
    thread.join()
    assert len(found) == 1
    assert time.monotonic() - started < 10
    # Others may have children too; this one's is gone and waited for.
    lists = Path("/proc/self/task").glob("*/children")
    assert not {n for path in lists for n in path.read_text().split()} - before


def test_where_nothing_can_be_forked_the_calling_thread_downloads(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetchers, "can_fork", lambda: False)
    processes: list[int] = []
    make(lambda count: processes.append(os.getpid())).fetch(NEED)
    assert processes == [os.getpid()]

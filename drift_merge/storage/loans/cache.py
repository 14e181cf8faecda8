"""Downloads shards ahead of their use and deletes them after it, never more than a limit.

Leases are granted in a fixed order, each as soon as its bytes fit beside those that are still
needed; a few downloads go on beside the work. Work that needs shards holds a ticket: it waits
until they are here, and its end may be the end of their leases. The plan of leases is made
elsewhere; in its order it must fit the limit.
"""

import shutil
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.hub.ranges import DownloadCancelled
from drift_merge.storage.loans.fetchers import Fetcher
from drift_merge.storage.loans.leases import Lease, ShardRequest, Traffic
from drift_merge.storage.shards import cannot_write
from drift_merge.storage.sources import RemoteShard

IN_FLIGHT = 2  # downloads at a time: most steps need a shard of each of two models
_PATIENCE_SECONDS = 0.1  # between two looks at whether the run has been stopped
_FAREWELL_SECONDS = 10.0  # for downloads to notice that nobody waits for them


class ShardCache(AbstractContextManager["ShardCache"]):
    """The shards of one run that are on this disk for a while. Enter it, then `start` it.

    To enter does nothing that an interrupt could leave half-done: it would not be undone.
    """

    def __init__(
        self,
        directory: Path,
        leases: Sequence[Lease],
        tickets: Mapping[Any, Collection[int]],
        *,
        limit_bytes: int,
        report: Callable[[int], None] = lambda _: None,
    ) -> None:
        """See the class.

        Args:
            directory: private; removed at the end.
            leases: in the order in which they are granted.
            tickets: the numbers of the leases that each piece of work needs.
            limit_bytes: of all shards that lie here at a time.
            report: called from the downloading threads with bytes that arrived.
        """
        self.directory = directory
        self.traffic = Traffic()
        self.on_evict: Callable[[RemoteShard], None] = lambda _: None  # before a shard is deleted
        self._leases, self._tickets, self._limit = leases, tickets, limit_bytes
        self._needs: dict[RemoteShard, ShardRequest] = {}  # of the latest lease of each shard
        self._report = report
        self._uses = [lease.num_uses for lease in leases]
        self._next = 0  # the lease to be granted next
        self._holders: dict[RemoteShard, int] = {}  # leases granted and not ended
        self._loading: set[RemoteShard] = set()
        self._present: set[RemoteShard] = set()
        self._used = 0
        self._error: BaseException | None = None
        self._is_stopped = False
        self._changed = threading.Condition()
        self._fetchers: list[Fetcher] = []

    def path(self, shard: RemoteShard) -> Path:
        """Where a shard lies while it is here."""
        return self.directory / self._needs[shard].place

    def covers(self, shard: RemoteShard, info: TensorInfo) -> bool:
        """Whether the data of a tensor is among what was fetched of its shard."""
        request = self._needs.get(shard)
        if request is None:
            return False
        begin, end = info.start, info.start + info.size_bytes
        return not request.ranges or any(b <= begin and end <= e for b, e in request.ranges)

    @contextmanager
    def borrow(
        self, ticket: Hashable, uses: int = 1, check: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Work on the shards of a ticket; wait until they are here.

        Args:
            ticket: known or not; an unknown one needs nothing.
            uses: how many of the uses counted in the leases this work is.
            check: called while waiting; raises to give up.

        Raises:
            DriftMergeError: a shard could not be fetched.
        """
        with self._changed:
            while not self.is_here(ticket):
                check()
                self._changed.wait(_PATIENCE_SECONDS)
        yield
        self.give_back(ticket, uses)

    def is_here(self, ticket: Hashable) -> bool:
        """Whether work on a ticket can begin; its shards then stay until it has been passed by.

        Raises:
            DriftMergeError: a shard could not be fetched.
        """
        with self._changed:
            numbers = self._tickets.get(ticket, ())
            if all(map(self._is_ready, numbers)):
                return True
            self._raise_error(numbers)
            return False

    def adopt(self, ticket: Hashable) -> None:
        """In a child process: take the shards of a ticket to be here, as the parent says."""
        for number in self._tickets.get(ticket, ()):
            request = self._leases[number].request
            self._needs[request.shard] = request

    def give_back(self, ticket: Hashable, uses: int = 1) -> None:
        """Count uses of a ticket as done, without waiting for its shards."""
        with self._changed:
            for number in self._tickets.get(ticket, ()):
                self._uses[number] -= uses
                if self._uses[number] == 0 and number < self._next:
                    self._end(self._leases[number].request.shard)
            self._changed.notify_all()

    def _is_ready(self, number: int) -> bool:
        return number < self._next and self._leases[number].request.shard in self._present

    def _raise_error(self, numbers: Collection[int]) -> None:
        """Raise what a download met, unless all that is waited for is still under way."""
        if self._error is None:
            return
        granted = [n < self._next for n in numbers]
        shards = [self._leases[number].request.shard for number in numbers]
        coming = [shard in self._present or shard in self._loading for shard in shards]
        if not all(granted) or not all(coming):
            raise self._error

    def _fetch_leases(self, fetcher: Fetcher) -> None:
        """One downloading thread: take the next lease until there is none."""
        while (lease := self._grant()) is not None:
            shard = lease.request.shard
            try:
                self._fetch(fetcher, lease)
            except BaseException as error:
                self._fail(shard, error)
                return
            with self._changed:
                self._loading.discard(shard)
                self._present.add(shard)
                if self._holders[shard] == 0:
                    self._evict(shard)
                self._changed.notify_all()

    def _grant(self) -> Lease | None:
        """Wait until the next lease fits, and take it; None when there is no more to do."""
        with self._changed:
            while not self._is_stopped and self._error is None and self._next < len(self._leases):
                lease, is_used = self._leases[self._next], self._uses[self._next] > 0
                request, shard = lease.request, lease.request.shard
                is_here = shard in self._present or shard in self._loading
                if not is_used or (is_here and self._needs[shard] == request):
                    self._next += 1  # passed by; or it simply stays longer
                    self._holders[shard] = self._holders.get(shard, 0) + is_used
                    self._changed.notify_all()
                elif not is_here and self._used + request.size_bytes <= self._limit:
                    self._next += 1
                    self._take(request)
                    return lease
                else:
                    self._changed.wait()
            return None

    def _take(self, request: ShardRequest) -> None:
        self._needs[request.shard] = request
        self._holders[request.shard] = 1
        self._loading.add(request.shard)
        self._used += request.size_bytes
        self.traffic.peak_bytes = max(self.traffic.peak_bytes, self._used)

    def _fetch(self, fetcher: Fetcher, lease: Lease) -> None:
        is_kept = fetcher.fetch(lease.request)
        with self._changed:
            self.traffic.num_kept += is_kept
            self.traffic.num_downloads += not is_kept
            self.traffic.num_parts += not is_kept and bool(lease.request.ranges)
            self.traffic.again_bytes += 0 if is_kept else lease.again_bytes

    def _count(self, size: int) -> None:
        if self._is_stopped:
            raise DownloadCancelled
        with self._changed:
            self.traffic.downloaded_bytes += size
        self._report(size)

    def _fail(self, shard: RemoteShard, error: BaseException) -> None:
        with self._changed:
            self._loading.discard(shard)
            if self._error is None and not isinstance(error, DownloadCancelled):
                self._error = error
            self._changed.notify_all()

    def _end(self, shard: RemoteShard) -> None:
        """One lease less; the last one takes the shard with it, or the download will."""
        self._holders[shard] -= 1
        if self._holders[shard] == 0 and shard in self._present:
            self._evict(shard)

    def _evict(self, shard: RemoteShard) -> None:
        self.on_evict(shard)
        path = self.path(shard)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._error = self._error or cannot_write(path, error)
        self._present.discard(shard)
        self._used -= self._needs[shard].size_bytes

    def start(self) -> None:
        """Delete what an earlier run left and this one does not need; begin to download."""
        kept, size = set(), 0
        for lease in self._leases:  # what is here already must not break the limit
            size += lease.request.size_bytes if lease.request.place not in kept else 0
            if size > self._limit:
                break
            kept.add(lease.request.place)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_all_but(self.directory, kept)
        except OSError as error:
            raise cannot_write(self.directory, error) from error
        # All processes before the first thread: a fork copies locks as other threads hold them.
        for _ in range(min(IN_FLIGHT, len(self._leases))):
            self._fetchers.append(Fetcher(self.directory, self._count))
        for fetcher in self._fetchers:
            # Daemons: a download in a thread that does not notice must not keep the process.
            Thread(target=self._fetch_leases, args=[fetcher], daemon=True).start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        for fetcher in self._fetchers:
            fetcher.end()
        with self._changed:
            self._changed.wait_for(lambda: not self._loading, _FAREWELL_SECONDS)
        here = {self._needs[shard].place for shard in self._present} if kind else set()
        with suppress(OSError):  # a leftover is deleted by the next run, or with the whole folder
            _remove_all_but(self.directory, here)
            if not here:
                shutil.rmtree(self.directory)


def _remove_all_but(directory: Path, kept: Collection[str]) -> None:
    """Delete every file below a directory but some."""
    for path in directory.rglob("*"):
        if path.is_file() and path.relative_to(directory).as_posix() not in kept:
            path.unlink(missing_ok=True)

"""Downloads shards in processes of their own, which can be ended at once and leave no lock.

A thread that downloads holds locks of its HTTP client, which huggingface_hub takes in every child
when this process forks its workers; the child would wait for ever. Where processes cannot be
forked, downloads are made in the calling thread.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from drift_merge.errors import SourceError
from drift_merge.storage.hub.ranges import Count, DownloadCancelled, fetch_ranges
from drift_merge.storage.hub.shards import fetch_whole, is_whole
from drift_merge.storage.loans.leases import ShardRequest
from drift_merge.storage.processes import Child, can_fork, fork, portable

_REPORT_BYTES = 2**20  # arrived since the last word to the parent


def fetch_request(request: ShardRequest, directory: Path, count: Count) -> bool:
    """Have a shard, or the part of it that is needed, on the disk.

    Args:
        request: where it comes from, and its place below the directory.
        directory: of the cache.
        count: called with bytes as they arrive.

    Returns:
        Whether it was there, left by an interrupted run.

    Raises:
        SourceError, OutputError: see `fetch_whole`.
        DownloadCancelled: raised by `count`.
    """
    path = directory / request.place
    # A part has its name only if all of it was on the disk; a whole shard is looked at again.
    if path.is_file() if request.ranges else is_whole(request.shard, path):
        return True
    if request.ranges:
        fetch_ranges(request.shard, request.ranges, path, count)
    else:
        fetch_whole(request.shard, directory, count)
    return False


class Fetcher:
    """One download at a time, in a process of its own; made in the main thread, used in another."""

    def __init__(self, directory: Path, count: Callable[[int], None]) -> None:
        """See the class.

        Args:
            directory: of the cache.
            count: called with bytes as they arrive; may raise DownloadCancelled.
        """
        self._directory, self._count = directory, count
        self._is_ended = False
        self._child: Child | None = fork(self._serve) if can_fork() else None

    def fetch(self, request: ShardRequest) -> bool:
        """See `fetch_request`.

        Raises:
            SourceError, OutputError: as there; also if the process has died.
            DownloadCancelled: it has been ended.
        """
        if self._child is None:
            return fetch_request(request, self._directory, self._count)
        try:
            self._child.connection.send(request)
            while type(message := self._child.connection.recv()) is int:
                self._count(message)
        except (EOFError, OSError) as error:
            if self._is_ended:
                raise DownloadCancelled from error
            raise SourceError(
                f"The process that was fetching {request.shard.file} has ended without a word.",
                remedy="Signal 9 is usually the system out of memory. Run the same command again: "
                "it resumes.",
            ) from error
        if isinstance(message, BaseException):
            raise message
        return bool(message)

    def end(self) -> None:
        """End the process, whatever it does."""
        self._is_ended = True
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.kill(self._child.process, signal.SIGKILL)
            os.waitpid(self._child.process, 0)

    def _serve(self, connection: "Connection[Any, Any]") -> None:
        """What the process does until it is ended."""
        arrived = 0

        def count(size: int) -> None:
            nonlocal arrived
            arrived += size
            if abs(arrived) >= _REPORT_BYTES:
                connection.send(arrived)
                arrived = 0

        while True:
            request = connection.recv()
            try:
                answer: Any = fetch_request(request, self._directory, count)
            except BaseException as error:
                answer = portable(error)
            connection.send(arrived)
            arrived = 0
            connection.send(answer)

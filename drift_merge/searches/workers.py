"""The processes of one search on this machine: each holds a lock while it lives, and cleans up.

    FOLDER/gate              held for a moment, by whoever joins or tidies up
    FOLDER/finish            held by whoever makes what comes after the trials
    FOLDER/PROCESS.lock      held by one process; says where it makes its models

A lock that can be taken is of a process that is gone, whatever ended it.
"""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drift_merge.storage.shards import cannot_write

_PREFIX = "drift-search-"  # of the folders of models: nothing else is ever removed


class Workers:
    """This process among those of the search; enter it to join."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        """Join later.

        Args:
            folder: of the locks.
            scratch: below which models are made.
        """
        self.folder = folder.absolute()
        process = f"{os.getpid()}-{time.time_ns():x}"
        self._file = self.folder / f"{process}.lock"
        self.name = f"{socket.gethostname()}:{self._file}"
        self.place = scratch.absolute() / f"{_PREFIX}{process}"  # for the models of this process
        self.index = 0  # number of processes that were there before
        self._lock: int | None = None

    def __enter__(self) -> "Workers":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.gate():
                self._tidy()
                self._lock = _take(self._file, wait=False)
                self._file.write_text(f"{self.place}\n", encoding="utf-8")
                self.place.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self._file.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)

    @contextmanager
    def gate(self) -> Iterator[None]:
        """One process at a time, for a moment."""
        with self._held("gate"):
            yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """One process at a time; the others wait."""
        with self._held("finish"):
            yield

    @contextmanager
    def trying(self, name: str) -> Iterator[bool]:
        """Whether this process is the one that does something; the others go on without it."""
        lock = _take(self.folder / name, wait=False)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                os.close(lock)

    def is_gone(self, name: str) -> bool:
        """Whether a process of this machine has ended; never of one that cannot be seen."""
        host, _, file = name.partition(":")
        if host != socket.gethostname() or name == self.name or not Path(file).parent.is_dir():
            return False
        return not _is_held(Path(file))

    def _tidy(self) -> None:
        """Remove what processes that are gone have left, and count those that are there."""
        for file in self.folder.glob("*.lock"):
            if _is_held(file):
                self.index += 1
                continue
            place = Path(file.read_text(encoding="utf-8").strip() or "nowhere")
            if place.name.startswith(_PREFIX):
                shutil.rmtree(place, ignore_errors=True)
            file.unlink(missing_ok=True)

    @contextmanager
    def _held(self, name: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _take(self.folder / name, wait=True)
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)


def _take(path: Path, *, wait: bool, create: bool = True) -> int | None:
    """Hold a lock; None if somebody else does, or if it is not there and is not to be made."""
    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _is_held(path: Path) -> bool:
    lock = _take(path, wait=False, create=False)
    if lock is not None:
        os.close(lock)
    return lock is None and path.exists()

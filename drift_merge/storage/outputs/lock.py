"""The lock of a directory that is being written: flock(2), and on some file systems a name too.

The kernel gives a lock up when its process ends, however that happens. Where locks do not reach
other hosts, the lock file names the host that writes; another host then refuses, since it cannot
know whether that process still lives.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from shlex import quote

from drift_merge.errors import OutputError
from drift_merge.storage.outputs.filesystems import FileSystem, file_system_of
from drift_merge.storage.shards import cannot_write

_SETTLE_SECONDS = 1.0  # for two hosts that write their names at the same moment


class DirectoryLock:
    """The lock on a directory's `lock` file, held from `take` to `release`."""

    def __init__(self, directory: Path, wanted: Path) -> None:
        """See the class; `wanted` is what the user wants to write, for messages."""
        self.path = directory / "lock"
        self._wanted = wanted
        self._file: int | None = None
        self._is_named = False

    @property
    def is_held(self) -> bool:
        """Between `take` and `release`."""
        return self._file is not None

    def take(self) -> None:
        """Take it, making the directory.

        Raises:
            OutputError: another process has it, or it cannot be had here.
        """
        while self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # the one who held it has just removed the directory
            except OSError as error:
                raise cannot_write(self.path, error) from error
            try:
                self._lock(file)
            except BaseException:
                os.close(file)
                raise
            # The one who held it may have removed the file between our open and our lock.
            with suppress(OSError):
                if os.stat(self.path).st_ino == os.fstat(file).st_ino:
                    self._file = file
                    continue
            os.close(file)
        place = file_system_of(self.path.parent)
        if not place.locks_reach:
            self._write_name(place)

    def _lock(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError(
                    f"another process is writing {self._wanted}.",
                    remedy="Wait for it, or choose another directory with -o.",
                ) from error
            kind = file_system_of(self.path.parent).kind
            raise OutputError(
                f"{self.path} cannot be locked ({kind}): {error.strerror or error}.",
                remedy="Choose a directory on a file system with locks with -o; the guide scale "
                "lists them: drift-merge guide scale",
            ) from error

    def _write_name(self, place: FileSystem) -> None:
        """Name this host in the lock file, or refuse because another one is named there."""
        assert self._file is not None
        own = json.dumps({"host": socket.gethostname(), "boot": _boot()})
        other = _named(self.path)
        try:
            if other in ("", own):
                os.pwrite(self._file, own.encode(), 0)
                os.fsync(self._file)
                self._is_named = True
                if other == "":
                    time.sleep(_SETTLE_SECONDS)
                    other = _named(self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if other not in ("", own):
            self._is_named = False
            raise OutputError(
                f"{self._wanted} is or was being written from another host ({other}), and locks on "
                f"this file system ({place.kind}) do not reach from one host to the other.",
                remedy="Wait for that run. If it has ended without a word, discard its lock: "
                f"rm {quote(str(self.path))}",
            )

    def release(self) -> None:
        """Give it up."""
        if self._file is not None:
            if self._is_named:
                with suppress(OSError):
                    os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = None


def _named(path: Path) -> str:
    """What the lock file says now, not what was open before."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _boot() -> str:
    """This start of this system: containers of several hosts may share a name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""

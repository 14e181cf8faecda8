"""The journal of an unfinished output: which tensors are on the disk, and what was measured.

One JSON object a line. The first names the plan; each later one holds tensors whose data had
been flushed before the line was written. A line torn by a crash is cut off and done again.
"""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drift_merge.storage.measured import Results
from drift_merge.storage.shards import cannot_read, cannot_write


def read_journal(path: Path) -> tuple[str | None, Results, int]:
    """Read a journal.

    Returns:
        The plan's fingerprint (None when the file is absent or its first line torn), the
        finished tensors, and the number of good bytes.

    Raises:
        OutputError: the file is there and cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, {}, 0
    except OSError as error:
        raise cannot_read(path, error) from error
    plan: str | None = None
    finished: Results = {}
    good = 0
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        key, kind = ("plan", str) if plan is None else ("done", dict)
        value = entry.get(key) if isinstance(entry, dict) else None
        if not line.endswith(b"\n") or not isinstance(value, kind):
            break
        if isinstance(value, str):
            plan = value
        else:
            finished.update(value)
        good += len(line)
    return plan, finished, good


class Journal:
    """The open journal; every line is on the disk before `append` returns."""

    def __init__(self, path: Path, *, plan: str, good_bytes: int) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            os.ftruncate(self._file, good_bytes)
            os.lseek(self._file, good_bytes, os.SEEK_SET)
            if good_bytes == 0:
                self._append({"plan": plan})
        except OSError as error:
            self.close()
            raise cannot_write(path, error) from error
        except BaseException:
            self.close()
            raise

    def append(self, done: Results) -> None:
        """Record finished tensors. Their data must have been flushed."""
        if done:
            self._append({"done": done})

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        try:
            while line:
                written = os.write(self._file, line)
                if written == 0:
                    raise OSError(errno.EIO, "nothing was written")
                line = line[written:]
            os.fsync(self._file)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

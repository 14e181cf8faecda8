"""Small files written and large ones copied, flushed before they count as there."""

import os
from collections.abc import Callable
from pathlib import Path

from drift_merge.errors import CheckpointError
from drift_merge.storage.fingerprints import WINDOW_BYTES, Fingerprint
from drift_merge.storage.folder.faults import cannot_open
from drift_merge.storage.folder.limits import Descriptor
from drift_merge.storage.shards import cannot_write, reserve


def write_file(path: Path, data: bytes) -> None:
    """Write one small file and flush it; folders above it are made.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def copy_file(source: Path, target: Path, label: str) -> str:
    """Copy a file in windows, its space reserved first, and flush it.

    Args:
        source: what to copy; a link is followed.
        target: where to; folders above it are made.
        label: the source in the user's words.

    Returns:
        Fingerprint of the bytes.

    Raises:
        CheckpointError: the source cannot be read, or changes meanwhile.
        OutputError: the target cannot be written.
    """
    try:
        with open(source, "rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            found = _copy(file.readinto, before.st_size, target, label)
            if os.fstat(file.fileno()).st_mtime_ns != before.st_mtime_ns:
                raise CheckpointError(
                    f"{label} changed while it was being used.",
                    remedy="Let what writes it finish, then run the command again.",
                )
            return found
    except OSError as error:
        raise cannot_open(label, source, error) from error


def _copy(read: Callable[[memoryview], int | None], size: int, target: Path, label: str) -> str:
    fingerprint = Fingerprint()
    window = memoryview(bytearray(min(WINDOW_BYTES, size + 1)))
    copied = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = Descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        reserve(file.number, size)
    except OSError as error:
        raise cannot_write(target, error, needed=size) from error
    while found := read(window):  # outside of the try: a fault of the source, not of the target
        fingerprint.update(window[:found])
        copied += found
        try:
            _write_whole(file.number, window[:found])
        except OSError as error:
            raise cannot_write(target, error, needed=size) from error
    try:
        os.fsync(file.number)
    except OSError as error:
        raise cannot_write(target, error) from error
    if copied != size:
        raise CheckpointError(
            f"{label} changed while it was being used: it had {size:,} bytes, now {copied:,}.",
            remedy="Let the download finish, then run the command again.",
        )
    return fingerprint.text()


def _write_whole(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]

"""Fingerprints: short names for bytes, equal wherever the bytes lie.

`xxh3:` followed by 32 hex digits, XXH3-128 of the bytes of a tensor as stored (row-major,
little-endian). It finds damage and confusion, not malice. A checkpoint's fingerprint
covers names, dtypes and shapes, so that it does not depend on how the files are sharded.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.folder.faults import cannot_open
from drift_merge.storage.headers import state_of

WINDOW_BYTES = 2**22  # of a file that is read through


class Fingerprint:
    """A fingerprint under way: feed it the bytes of a tensor from first to last."""

    __slots__ = ("_hash",)

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, data: Any) -> None:
        """Add bytes (any contiguous buffer)."""
        self._hash.update(data)

    def text(self) -> str:
        """`xxh3:` and 32 hex digits."""
        return f"xxh3:{self._hash.hexdigest()}"


def of_bytes(data: Any) -> str:
    """The fingerprint of one buffer."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"


def of_file(path: Path) -> str:
    """The fingerprint of a file, read in windows; OSError where it cannot be."""
    fingerprint = Fingerprint()
    window = memoryview(bytearray(WINDOW_BYTES))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(window):
            fingerprint.update(window[:size])
    return fingerprint.text()


def of_json(value: Any) -> str:
    """The fingerprint of plain data, independent of the order of its keys."""
    return of_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def of_layout(checkpoint: Checkpoint) -> str:
    """The fingerprint of a checkpoint's names, dtypes and shapes, whatever its sharding."""
    return of_json([[t.name, t.dtype, list(t.shape)] for t in checkpoint.tensors.values()])


def of_files(checkpoint: Checkpoint) -> str:
    """What a resumed run must find unchanged: shard names, sizes, times of change, headers.

    A commit on the Hub never changes, whether its shards are on this disk or not.

    Raises:
        CheckpointError: a shard has vanished since its header was read.
    """
    rows: list[list[Any]] = []
    commit = _commit(checkpoint)
    for name, header in checkpoint.shards.items():
        if commit is not None or name in checkpoint.remote:
            rows.append([name, header.file_bytes, commit])
            continue
        path = checkpoint.file(name)
        try:
            stat = path.stat()
        except OSError as error:
            raise cannot_open(name, path, error) from error
        rows.append([name, header.file_bytes, stat.st_mtime_ns])
    return of_json([rows, of_layout(checkpoint), checkpoint.config])


def _commit(checkpoint: Checkpoint) -> str | None:
    """The commit that all shards are of; that of an adapter says nothing of its base."""
    return None if checkpoint.adapters else checkpoint.source.revision


def require_unchanged(*checkpoints: Checkpoint) -> None:
    """Refuse what was made of shards that are not what they were when their headers were read.

    Raises:
        CheckpointError: naming the first that was changed, replaced or removed.
    """
    for checkpoint in checkpoints:
        if _commit(checkpoint) is not None:
            continue  # a commit on the Hub never changes
        for name, header in checkpoint.shards.items():
            if name in checkpoint.remote or header.state is None:
                continue
            path = checkpoint.file(name)
            try:
                found = state_of(path.stat())
            except OSError as error:
                raise cannot_open(name, path, error) from error
            if found != header.state:
                raise CheckpointError(
                    f"{path} was changed or replaced while it was being read.",
                    remedy="Let what writes it finish, then run the command again.",
                )


def of_fingerprints(fingerprints: Mapping[str, str] | Iterable[tuple[str, str]]) -> str:
    """One fingerprint for named fingerprints, independent of their order."""
    return of_json(dict(fingerprints))


def key_of(*parts: object) -> int:
    """A 64-bit key of some values in their order, for counter-based random masks."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode())

"""Tensor data in windows, never a copy of a checkpoint: read; for training through mmap.

Commands read (`read`): a file that shrinks under a map kills the process (SIGBUS), under a read it
is an error that names the file. A read costs what the map costs, measured: its copy stays in the
cache, and no pages are mapped and handed back. Training alone, which looks at the same deltas in
every step, does so through a map (`view`).

Knows bytes and offsets; what they mean is the engine's business.
"""

import mmap
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.folder.faults import cannot_open
from drift_merge.storage.folder.limits import Descriptor, Recent, share_of_files
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.sources import RemoteShard


class HeldShards(Protocol):
    """What is on this disk of shards of the Hub, perhaps for a while, perhaps in part."""

    on_evict: Callable[[RemoteShard], None]  # called before a shard is deleted

    def path(self, shard: RemoteShard) -> Path:
        """Where a shard lies."""

    def covers(self, shard: RemoteShard, info: TensorInfo) -> bool:
        """Whether what is wanted of a tensor is there."""


class MappedCheckpoint(AbstractContextManager["MappedCheckpoint"]):
    """The shards of a checkpoint, opened on first use. Safe to share between threads.

    Shards that are on the Hub are looked for in `cache`, where they are while they are held.
    `share` checkpoints are read side by side: each keeps its part of the files that a process may
    open, and opens the longest unused shard anew if it is wanted.
    """

    def __init__(
        self, checkpoint: Checkpoint, cache: HeldShards | None = None, *, share: int = 1
    ) -> None:
        self.checkpoint = checkpoint
        self._cache = cache
        self._maps: Recent[mmap.mmap] = Recent(share_of_files(2 * share))
        self._files: Recent[Descriptor] = Recent(share_of_files(2 * share))

    def read(self, info: TensorInfo, begin: int, target: memoryview) -> None:
        """Fill a buffer with the data of a tensor, from a byte on.

        Raises:
            CheckpointError: the file cannot be opened or read, or has another size than when its
                header was read.
        """
        self._require_data(info)
        file = self._descriptor(info.shard)
        self._require_size(info.shard, os.fstat(file.number).st_size)
        at = info.start + begin
        while target:
            try:
                count = os.preadv(file.number, [target], at)
            except OSError as error:
                raise cannot_open(info.shard, self._file(info.shard), error) from error
            if count == 0:
                self._require_size(info.shard, os.fstat(file.number).st_size)
                raise _changed(info.shard, "a read ended before its end")  # and it grew back
            target, at = target[count:], at + count

    def read_only_what_is_asked(self, info: TensorInfo) -> None:
        """Of a tensor's shard read nothing ahead: a look at a few bytes reads 128 kB otherwise."""
        self._require_data(info)
        with suppress(OSError):  # no file system must take advice
            os.posix_fadvise(self._descriptor(info.shard).number, 0, 0, os.POSIX_FADV_RANDOM)

    def view(self, info: TensorInfo, begin: int = 0, end: int | None = None) -> memoryview:
        """Bytes [begin, end) of the data of a tensor, without a copy.

        Raises:
            CheckpointError: the file cannot be opened, or has another size than when its header
                was read.
        """
        end = info.size_bytes if end is None else end
        return memoryview(self.check(info))[info.start + begin : info.start + end]

    def check(self, info: TensorInfo) -> mmap.mmap:
        """The map of a shard whose data may be looked at: raises as `view` does.

        A read past the end of a mapped file kills the process (SIGBUS): look before each one.
        """
        self._require_data(info)
        mapped = self._map(info.shard)
        self._require_size(info.shard, mapped.size())
        return mapped

    def drop(self, shard: str) -> None:
        """Close a shard that is about to be deleted; it is opened anew if it comes back."""
        self._files.drop(shard)
        mapped = self._maps.drop(shard)
        if mapped is not None:
            with suppress(BufferError):  # something still looks at it: it lives until that ends
                mapped.close()

    def drop_remote(self) -> None:
        """Close every shard of the cache."""
        names = {*self._maps.names(), *self._files.names()}
        for shard in names & self.checkpoint.remote.keys():
            self.drop(shard)

    def _require_data(self, info: TensorInfo) -> None:
        """Of a shard that was fetched in part, the rest is a hole that reads as zeros."""
        remote = self.checkpoint.remote.get(info.shard)
        if remote is not None and not (self._cache and self._cache.covers(remote, info)):
            raise RuntimeError(f"{info.name} was not among what is fetched of {info.shard}")

    def _file(self, shard: str) -> Path:
        remote = self.checkpoint.remote.get(shard)
        if remote is None or self._cache is None:
            return self.checkpoint.file(shard)
        return self._cache.path(remote)

    def _map(self, shard: str) -> mmap.mmap:
        return self._maps.get(shard, lambda: self._open(shard))

    def _descriptor(self, shard: str) -> Descriptor:
        return self._files.get(shard, lambda: self._open_file(shard))

    def _open_file(self, shard: str) -> Descriptor:
        path = self._file(shard)
        try:
            file = Descriptor(path, os.O_RDONLY)
            self._require_size(shard, os.fstat(file.number).st_size)
        except OSError as error:
            raise cannot_open(shard, path, error) from error
        return file

    def _open(self, shard: str) -> mmap.mmap:
        path = self._file(shard)
        try:
            with open(path, "rb") as file:
                self._require_size(shard, os.fstat(file.fileno()).st_size)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise cannot_open(shard, path, error) from error

    def _require_size(self, shard: str, found: int) -> None:
        expected = self.checkpoint.shards[shard].file_bytes
        if found != expected:
            raise _changed(shard, f"it had {expected:,} bytes, now it has {found:,}")

    def close(self) -> None:
        """Drop the maps; a map that is still looked at lives until its views do."""
        self._maps.clear()
        self._files.clear()

    def __exit__(self, *_: object) -> None:
        self.close()


def _changed(shard: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"{shard} changed while it was being used: {how}.",
        remedy="Let the download finish, then run the command again.",
    )

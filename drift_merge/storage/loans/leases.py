"""What is needed of a shard, and by how much work before it may be deleted. Plain data."""

from collections.abc import Iterable
from dataclasses import dataclass

from drift_merge.storage.fingerprints import of_json
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.hub.ranges import Range, join_ranges
from drift_merge.storage.sources import RemoteShard

WORTH_PARTING_BYTES = 2**24  # a smaller shard is fetched whole, however little of it is needed


@dataclass(frozen=True, slots=True)
class ShardRequest:
    """What is needed of a shard."""

    shard: RemoteShard
    ranges: tuple[Range, ...]  # bytes of the file; () for all of it

    @property
    def size_bytes(self) -> int:
        """Bytes that travel, and that lie on the disk."""
        return sum(end - begin for begin, end in self.ranges) or self.shard.file_bytes

    @property
    def place(self) -> str:
        """Where it lies, relative to the cache."""
        if not self.ranges:
            return self.shard.place
        return f"{self.shard.place}.{of_json(self.ranges)[-8:]}.part"


def shard_request(shard: RemoteShard, infos: Iterable[TensorInfo]) -> ShardRequest:
    """All of a shard, or only some tensors of it where they are less than half."""
    ranges = join_ranges((i.start, i.start + i.size_bytes) for i in infos if i.size_bytes)
    part = ShardRequest(shard, ranges)
    is_worth_it = shard.file_bytes >= WORTH_PARTING_BYTES and 2 * part.size_bytes < shard.file_bytes
    return part if is_worth_it else ShardRequest(shard, ())


@dataclass(frozen=True, slots=True)
class Lease:
    """One stay of a shard on this disk: from its download to the end of its last use."""

    request: ShardRequest
    num_uses: int  # by work; after the last one the shard is deleted
    again_bytes: int = 0  # among those of the request: bytes that earlier leases have fetched


@dataclass(slots=True)
class Traffic:
    """What a run has moved."""

    downloaded_bytes: int = 0  # as they arrived, those of failed attempts too
    num_downloads: int = 0  # whole shards and parts
    num_parts: int = 0  # among them: shards of which only ranges were fetched
    again_bytes: int = 0  # fetched by this run before; the limit did not let them stay
    num_kept: int = 0  # shards found on the disk, left by an interrupted run
    peak_bytes: int = 0  # most that lay on the disk at a time

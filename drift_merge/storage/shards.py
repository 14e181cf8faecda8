"""Output shards: laid out from names and shapes alone, then written header first.

All offsets are known before any data is, so that space is reserved up front (a full disk is
found before the work) and data is put at fixed places, in any order, by any thread.
"""

import errno
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from drift_merge.errors import OutputError
from drift_merge.storage.folder.faults import too_many_files_remedy
from drift_merge.storage.folder.limits import Descriptor, Recent, share_of_files
from drift_merge.storage.headers import DTYPE_BITS, TensorInfo, encode_header, tensor_bytes

_DIGITS = re.compile(r"([0-9]+)")

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype code, shape


@dataclass(frozen=True, slots=True)
class OutputShard:
    """One shard to be written."""

    file: str
    header: bytes  # the first bytes of the file
    file_bytes: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where every output tensor will lie."""

    shards: tuple[OutputShard, ...]
    tensors: dict[str, TensorInfo]  # by name, in file order
    index: tuple[str, bytes] | None  # name and bytes of the index file

    @property
    def size_bytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.file_bytes for shard in self.shards)


def natural_key(name: str) -> tuple[list[Any], str]:
    """Sort key under which layer 2 comes before layer 10; no two names are equal under it."""
    parts: list[Any] = _DIGITS.split(name)
    # As (length, digits), not int: a hostile name may have more digits than int() takes.
    for place in range(1, len(parts), 2):
        digits = parts[place].lstrip("0")
        parts[place] = (len(digits), digits)
    return parts, name


def lay_out(
    entries: Iterable[Entry],
    *,
    stem: str,
    max_shard_bytes: int,
    metadata: Mapping[str, str],
    always_numbered: bool = False,
) -> ShardLayout:
    """Distribute tensors over shards; equal inputs in any order give equal bytes.

    Args:
        entries: (name, dtype code, shape) of every output tensor.
        stem: file name before the number, `model` or `prior`.
        max_shard_bytes: limit for the data of one shard; only a tensor that is larger by itself
            exceeds it.
        metadata: `__metadata__` of every shard.
        always_numbered: `stem-00001-of-00001.safetensors` and an index even for one shard.
    """
    ordered = sorted(entries, key=lambda entry: natural_key(entry[0]))
    groups = _fill(ordered, max_shard_bytes)
    numbered = always_numbered or len(groups) > 1
    shards, tensors = [], {}
    for number, group in enumerate(groups, start=1):
        name = f"{stem}-{number:05d}-of-{len(groups):05d}" if numbered else stem
        file = f"{name}.safetensors"
        # Wide dtypes first, as the safetensors library writes them, so that all data is aligned.
        group = sorted(group, key=lambda entry: -DTYPE_BITS[entry[1]])
        header, starts = encode_header(group, metadata)
        end = len(header)
        for tensor, dtype, shape in group:
            size = tensor_bytes(dtype, shape)
            tensors[tensor] = TensorInfo(tensor, dtype, shape, file, starts[tensor], size)
            end += size
        shards.append(OutputShard(file, header, end))
    index = _index(stem, tensors) if numbered else None
    return ShardLayout(tuple(shards), tensors, index)


def _fill(ordered: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    groups: list[list[Entry]] = []
    filled = 0
    for entry in ordered:
        size = tensor_bytes(entry[1], entry[2])
        if not groups or filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    return groups


def _index(stem: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, bytes]:
    total = sum(info.size_bytes for info in tensors.values())
    weight_map = {name: tensors[name].shard for name in sorted(tensors)}
    # As json.dumps(..., indent=2) writes it, which takes ten times as long.
    lines = json.dumps(weight_map, separators=(",\n    ", ": "))[1:-1]
    head = f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{\n    '
    return f"{stem}.safetensors.index.json", f"{head}{lines}\n  }}\n}}\n".encode()


class ShardWriter:
    """Open output shards: space reserved, headers written, data put anywhere, any thread.

    `beside_bytes` more will be written to the directory; `share` writers are at work side by side.
    One process is the maker of the files; others write into them when they are there.
    """

    def __init__(
        self,
        layout: ShardLayout,
        directory: Path,
        *,
        beside_bytes: int = 0,
        share: int = 1,
        is_maker: bool = True,
    ) -> None:
        self.layout = layout
        self.directory = directory
        self.beside_bytes = beside_bytes
        self._is_maker = is_maker
        # Data of a file that is closed before its turn is flushed: its errors are seen here.
        self._files: Recent[Descriptor] = Recent(share_of_files(share), self._sync)
        self._flush_error: OutputError | None = None

    def open(self) -> None:
        """Create or reopen every shard at its full size and write its header.

        Any other safetensors file in the directory is removed: it would be published too.

        Raises:
            OutputError: the disk is too small, or the directory cannot be written.
        """
        try:
            self._remove_others()
            self._check_space()
        except OSError as error:
            raise cannot_write(self.directory, error) from error
        for shard in self.layout.shards:
            path = self.directory / shard.file
            try:
                descriptor = self._file(shard.file, os.O_CREAT)
                reserve(descriptor.number, shard.file_bytes)
                _write_all(descriptor.number, memoryview(shard.header), 0)
            except OSError as error:
                raise cannot_write(path, error, needed=shard.file_bytes) from error

    def _file(self, name: str, flags: int = 0) -> Descriptor:
        return self._files.get(name, lambda: Descriptor(self.directory / name, os.O_RDWR | flags))

    def _sync(self, descriptor: Descriptor) -> None:
        try:
            os.fdatasync(descriptor.number)
        except OSError as error:
            self._flush_error = cannot_write(self.directory, error)
            raise self._flush_error from error

    def _remove_others(self) -> None:
        ours = {shard.file for shard in self.layout.shards}
        for path in self.directory.glob("*.safetensors"):
            if path.name not in ours:
                path.unlink()

    def _check_space(self) -> None:
        needed = unwritten_bytes(self.layout, self.directory) + self.beside_bytes
        free = free_bytes(self.directory)
        if needed > free:
            raise OutputError(
                f"the disk of {self.directory.parent} is too small: "
                f"{needed:,} bytes are needed, {free:,} are free.",
                remedy="Free some space, or choose an output on another disk with -o.",
            )

    def write(self, info: TensorInfo, begin: int, data: Any) -> None:
        """Put bytes at [begin, begin + len) of the data of a tensor."""
        try:
            file = self._file(info.shard)
            _write_all(file.number, memoryview(data).cast("B"), info.start + begin)
        except OSError as error:
            raise cannot_write(self.directory / info.shard, error) from error

    def flush(self, shards: Collection[str] | None = None) -> None:
        """Return when everything written so far to some shards (None: to all) is on the disk.

        Raises:
            OutputError: it is not. Every later call raises too: after a failed flush the kernel
                forgets which pages are lost, and the next flush would succeed without them.
        """
        if self._flush_error is not None:
            raise self._flush_error
        for name in [s.file for s in self.layout.shards] if shards is None else shards:
            try:
                os.fdatasync(self._file(name).number)
            except OSError as error:
                self._flush_error = cannot_write(self.directory / name, error)
                raise self._flush_error from error

    def close(self) -> None:
        """Close the files; nothing is flushed."""
        self._files.clear()

    def __enter__(self) -> "ShardWriter":
        try:
            if self._is_maker:
                self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unwritten_bytes(layout: ShardLayout, directory: Path) -> int:
    """Bytes of a layout that have no place on the disk yet."""
    paths = [directory / shard.file for shard in layout.shards]
    have = sum(path.stat().st_blocks * 512 for path in paths if path.exists())
    return layout.size_bytes - have


def free_bytes(directory: Path) -> int:
    """Bytes that may still be written to the disk of a directory."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def cannot_write(path: Path, error: OSError, *, needed: int | None = None) -> OutputError:
    """The OutputError for a failed write: which file, why, and the way out."""
    want = f" ({needed:,} bytes)" if needed is not None else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space and run the same command again: it resumes where it stopped."
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = too_many_files_remedy()
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "Choose a directory you may write to with -o."
    else:
        remedy = "Check the disk, then run the same command again: it resumes where it stopped."
    return OutputError(f"{path} cannot be written{want}: {error.strerror or error}.", remedy=remedy)


def cannot_read(path: Path, error: OSError) -> OutputError:
    """The OutputError for unfinished state of ours that cannot be read."""
    return OutputError(
        f"{path} cannot be read: {error.strerror or error}.",
        remedy=f"See who owns it: ls -ld {quote(str(path))}  Or choose another directory with -o.",
    )


def reserve(descriptor: int, size: int) -> None:
    """Give an open file its size, and space on the disk where the file system can promise it."""
    if size == 0:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        # Some file systems (NFS, FUSE) cannot reserve; a sparse file of the right size must do.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    os.ftruncate(descriptor, size)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")  # or this loop would not end
        data = data[written:]
        offset += written

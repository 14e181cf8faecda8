"""Parts of a shard on the Hub, by HTTP range requests: its header, or some of its tensors.

Ranges arrive at their own offsets of a sparse file. No hash covers them; the commit, the size of
the file and the extent of every range are checked.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any

from drift_merge.errors import OutputError
from drift_merge.storage.headers import ShardHeader, header_length, parse_header, read_header
from drift_merge.storage.hub.faults import (
    LIBRARY,
    foreign_errors,
    is_offline,
    offline_error,
    patiently,
)
from drift_merge.storage.shards import cannot_write
from drift_merge.storage.sources import RemoteShard, Source

Range = tuple[int, int]  # bytes [begin, end) of a file
Count = Callable[[int], None]  # called with bytes that arrived; raises DownloadCancelled to stop

# Seconds before further attempts at a shard: a line that is down for a minute ends no run.
WAITS_SECONDS = (1.0, 3.0, 10.0, 30.0)
# Ranges nearer than this travel as one: as many bytes take about as long as one more request.
GAP_BYTES = 2**21


class DownloadCancelled(Exception):
    """A download that nobody waits for any more."""


def shard_header(source: Source, shard: str, size: int, guess: int) -> ShardHeader:
    """Read one header, from the cache if the shard is there, else by one or two requests.

    Args:
        source: a pinned Hub source.
        shard: file name in the repository.
        size: of the file, in bytes; -1 if the listing does not say.
        guess: bytes to ask for at first. Enough for the header saves the second request.

    Raises:
        SourceError: no answer, no right, or offline and not in the cache.
        CheckpointError: the header is broken.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(str(source.repo_id), shard, revision=source.revision)
    if isinstance(cached, str):
        return read_header(Path(cached), shard)
    if is_offline():
        raise offline_error(source, shard)
    data, size = _read_range(source, shard, 0, guess, size)
    length = header_length(data, shard=shard, file_bytes=size)
    if length > len(data):
        data += _read_range(source, shard, len(data), length, size)[0]
    return parse_header(data, shard=shard, file_bytes=size)


def _read_range(source: Source, shard: str, begin: int, end: int, size: int) -> tuple[bytes, int]:
    """Bytes [begin, end) of a file on the Hub, fewer at its end, and the size of the file."""
    if size == 0:
        return b"", 0  # no range of an empty file exists: the Hub would answer 416

    def read() -> tuple[bytes, int]:
        with open_range(source, shard, begin, end) as (response, chunks):
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            whole = int(total) if total.isdigit() else size
            # A mirror that ignores ranges sends the file from its start: read no more than asked.
            skip = 0 if response.status_code == 206 else begin
            data = bytearray()
            for chunk in chunks:
                data += chunk
                if len(data) >= skip + end - begin:
                    break
        wanted = min(end, whole) - begin
        if len(data) < skip + wanted:
            raise ConnectionError(f"{shard}: {len(data):,} of {skip + wanted:,} bytes arrived")
        return bytes(data[skip : skip + wanted]), whole

    return patiently(read, source)


@contextmanager
def open_range(
    source: Source, shard: str, begin: int, end: int
) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """A response whose body has not been read, and its chunks, from any huggingface_hub."""
    from huggingface_hub import constants, hf_hub_url

    utils: Any = import_module("huggingface_hub.utils")  # re-exports that type checkers refuse
    url = hf_hub_url(
        str(source.repo_id), shard, revision=source.revision, endpoint=constants.ENDPOINT
    )
    headers = utils.build_hf_headers(library_name=LIBRARY)
    headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    session = utils.get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(session.stream):  # httpx; in requests (huggingface_hub < 1.0) it is a flag
        opened = session.stream("GET", url, headers=headers, timeout=timeout)
    else:
        opened = session.get(url, headers=headers, timeout=timeout, stream=True)
    with opened as response:
        utils.hf_raise_for_status(response)
        is_httpx = hasattr(response, "iter_bytes")
        yield response, response.iter_bytes() if is_httpx else _as_they_arrive(response)


def _as_they_arrive(response: Any) -> Iterator[bytes]:
    """The body of a response of requests, whose own chunks of a size lose the last that broke."""
    raw = response.raw  # of urllib3, with errors of its own
    if not hasattr(raw, "read1"):  # urllib3 < 2.1
        yield from response.iter_content(65_536)
        return
    try:
        while data := raw.read1(65_536):
            yield data
    except import_module("urllib3.exceptions").HTTPError as error:
        raise ConnectionError(str(error)) from error


def join_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Sorted ranges, those that touch or almost touch joined."""
    joined: list[Range] = []
    for begin, end in sorted(ranges):
        if joined and begin - joined[-1][1] <= GAP_BYTES:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return tuple(joined)


def fetch_ranges(shard: RemoteShard, ranges: Sequence[Range], path: Path, count: Count) -> None:
    """Download ranges of a shard to their own offsets of a file; the rest of it stays a hole.

    The file gets its name when all of it is on the disk, so that it can be trusted by its name.

    Raises:
        SourceError: no answer after several attempts without progress.
        OutputError: the file cannot be written.
        DownloadCancelled: raised by `count`.
    """
    unfinished = path.with_name(f"{path.name}.incomplete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb", buffering=0) as file:
            file.truncate(shard.file_bytes)
            for begin, end in ranges:
                while begin < end:
                    begin = _read_on(shard, file, begin, end, count)
            os.fdatasync(file.fileno())
        os.rename(unfinished, path)
    except OSError as error:
        raise cannot_store(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _read_on(shard: RemoteShard, file: FileIO, begin: int, end: int, count: Count) -> int:
    """Write what arrives of [begin, end) before the connection breaks; the end of that."""

    def read() -> int:
        at = begin
        try:
            with open_range(shard.source, shard.file, begin, end) as (response, chunks):
                _require_range(shard, response, begin)
                for chunk in chunks:
                    data = chunk[: end - at]
                    _write(file, data, at)
                    at += len(data)
                    count(len(data))
        except foreign_errors():
            if at == begin:
                raise  # no progress: wait before the next attempt
        if at == begin:
            raise ConnectionError(f"{shard.file}: nothing arrived of {end - begin:,} bytes")
        return at

    return patiently(read, shard.source, waits=WAITS_SECONDS)


def _write(file: FileIO, data: bytes, offset: int) -> None:
    """Write it all; an error of the disk is none of the line, and passes no retry."""
    try:
        while data:
            written = os.pwrite(file.fileno(), data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        raise cannot_store(Path(os.fsdecode(file.name)), error) from error


def _require_range(shard: RemoteShard, response: Any, begin: int) -> None:
    """Refuse an answer that is not the range asked for, of a file of the size known."""
    found = str(response.headers.get("Content-Range", ""))
    expected = f"bytes {begin}-"
    if response.status_code != 206 or not found.startswith(expected):
        raise ConnectionError(f"{shard.file}: expected {expected}..., got {found or 'no range'}")
    if found.rpartition("/")[2] not in (str(shard.file_bytes), "*"):
        raise ConnectionError(f"{shard.file}: {found}, expected {shard.file_bytes} bytes in all")


def cannot_store(path: Path, error: Exception) -> OutputError:
    """The OutputError for a shard that finds no place on the disk."""
    cause = error if isinstance(error, OSError) else OSError(str(error))
    failed = cannot_write(path, cause)
    return OutputError(
        failed.message, remedy=f"{failed.remedy}\nA smaller --cache-limit helps too."
    )

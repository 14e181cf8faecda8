"""The header of one shard on the Hub, by HTTP range requests: kilobytes instead of gigabytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from drift_merge.storage.headers import ShardHeader, header_length, parse_header, read_header
from drift_merge.storage.hub_faults import LIBRARY, is_offline, offline_error, patiently
from drift_merge.storage.sources import Source


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
        with _open_range(source, shard, begin, end) as (response, chunks):
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
def _open_range(
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
        iterate = response.iter_bytes if hasattr(response, "iter_bytes") else response.iter_content
        yield response, iterate(65_536)

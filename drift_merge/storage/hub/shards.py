"""Single shards from the Hub into a directory of ours: checked, patiently.

They travel by `hf_hub_download` and are compared with the hash that the Hub lists. The user's own
Hub cache is read; shards are never written to it.
"""

import glob
import hashlib
import shutil
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

from drift_merge.errors import OutputError, SourceError
from drift_merge.storage.headers import ShardHeader
from drift_merge.storage.hub.artifacts import list_remote
from drift_merge.storage.hub.faults import (
    LIBRARY,
    explain,
    foreign_errors,
    is_offline,
    may_pass,
    patiently,
)
from drift_merge.storage.hub.models import fetch_file, progress_bars
from drift_merge.storage.hub.ranges import Count, cannot_store, fetch_ranges
from drift_merge.storage.sources import RemoteShard, Source

ATTEMPTS = 3  # at a shard that arrives with wrong bytes
_BUFFER = 2**22  # bytes


def find_remote(
    source: Source, shards: Mapping[str, ShardHeader], *, with_digests: bool
) -> tuple[Path, dict[str, RemoteShard]]:
    """Which shards of a checkpoint are not in the user's Hub cache.

    Args:
        source: pinned.
        shards: headers by file name.
        with_digests: ask for the hashes too; one request.

    Returns:
        The snapshot in the cache, and the shards that are not in it by file name.

    Raises:
        SourceError: the Hub does not answer.
    """
    from huggingface_hub import try_to_load_from_cache

    directory = fetch_file(source, "config.json").parent
    absent = [
        name
        for name in shards
        if not isinstance(
            try_to_load_from_cache(str(source.repo_id), name, revision=source.revision), str
        )
    ]
    listed = list_remote(source) if absent and with_digests else {}
    digests = {name: file.sha256 or file.git_sha1 for name, file in listed.items()}
    repo_id, revision = str(source.repo_id), str(source.revision)
    return directory, {
        name: RemoteShard(repo_id, revision, name, shards[name].file_bytes, digests.get(name))
        for name in absent
    }


def fetch_sidecars(source: Source, names: Iterable[str]) -> None:
    """Fetch small files of a pinned source into the user's Hub cache, as `fetch_snapshot` would.

    Raises:
        SourceError, OutputError: see `fetch_snapshot`.
    """
    from huggingface_hub import snapshot_download

    wanted = [glob.escape(name) for name in names]
    if not wanted or is_offline():
        return

    def download() -> str:
        return snapshot_download(
            str(source.repo_id),
            revision=source.revision,
            library_name=LIBRARY,
            allow_patterns=wanted,
        )

    with progress_bars(shown=False):
        patiently(download, source, retry_answers=False)


def fetch_whole(shard: RemoteShard, directory: Path, count: Count) -> Path:
    """Download a shard below `directory`, unless it is there, and check its size and hash.

    Args:
        shard: of a pinned revision.
        directory: a private one.
        count: called with bytes as they arrive.

    Returns:
        Where it is: `directory / shard.place`.

    Raises:
        SourceError: no answer after several attempts, or wrong bytes at each of them.
        OutputError: the directory cannot be written.
        DownloadCancelled: raised by `count`.
    """
    path = directory / shard.place
    fault = _fault(shard, path)
    for _ in range(ATTEMPTS):
        if fault is not None:
            path.unlink(missing_ok=True)
            _download(shard, directory, path, count)
            fault = _fault(shard, path)
    if fault is None:
        return path
    path.unlink(missing_ok=True)
    raise SourceError(
        f"{shard.file} of {shard.source.label} arrived {ATTEMPTS} times with wrong bytes: {fault}.",
        remedy="Something between here and the Hub changes the data (a proxy, a mirror, bad "
        "memory). Run the same command again: what is finished is kept.",
    )


def is_whole(shard: RemoteShard, path: Path) -> bool:
    """Whether a file is that shard, byte for byte."""
    return _fault(shard, path) is None


def _fault(shard: RemoteShard, path: Path) -> str | None:
    """How a file differs from the shard that it should be; None if it does not."""
    if not path.is_file():
        return "it is missing"
    size = path.stat().st_size
    if size != shard.file_bytes:
        return f"{size:,} bytes, expected {shard.file_bytes:,}"
    if shard.digest is None:
        return None
    found = _digest(path, is_git=len(shard.digest) == 40)
    return None if found == shard.digest else f"its hash is {found}, expected {shard.digest}"


def _digest(path: Path, *, is_git: bool) -> str:
    state = hashlib.sha1(usedforsecurity=False) if is_git else hashlib.sha256()
    if is_git:
        state.update(b"blob %d\0" % path.stat().st_size)
    buffer = memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            state.update(buffer[:size])
    return state.hexdigest()


def _download(shard: RemoteShard, directory: Path, path: Path, count: Count) -> None:
    """By huggingface_hub, which knows the fastest way; on a line that breaks, by ranges.

    huggingface_hub drops what it has of a chunk (10 MB) when the connection breaks, and in 2.x all
    of a file when it gives up; ranges keep every byte and wait longer.
    """
    from huggingface_hub import hf_hub_download

    # Into a folder, not into a cache: with hf_xet a cache may share its files with the user's.
    folder = directory / shard.place.removesuffix(f"/{shard.file}")
    options: dict[str, Any] = {"local_dir": folder, "library_name": LIBRARY}
    can_count = "tqdm_class" in signature(hf_hub_download).parameters  # huggingface_hub >= 1
    if can_count:
        options["tqdm_class"] = _counter(count)
    try:
        with nullcontext() if can_count else progress_bars(shown=False):
            hf_hub_download(shard.repo_id, shard.file, revision=shard.revision, **options)
        if not can_count:
            count(shard.file_bytes)
    except foreign_errors() as error:
        if not may_pass(error):
            explained = explain(error, shard.source)
            is_ours = isinstance(explained, OutputError)
            raise (cannot_store(path, error) if is_ours else explained) from error
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # may hold as much as has arrived
        fetch_ranges(shard, [(0, shard.file_bytes)], path, count)


def _counter(count: Count) -> type:
    """A progress bar that shows nothing, for huggingface_hub to call."""

    class Counter:
        n = 0
        total = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def update(self, size: float | None = 1) -> None:
            count(int(size or 0))

        def update_transfer(self, size: float | None = 1) -> None:
            pass

        set_postfix_str = set_transfer_postfix_str = refresh = close = lambda *_, **__: None

        def __enter__(self) -> "Counter":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    return Counter

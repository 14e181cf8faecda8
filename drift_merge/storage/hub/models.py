"""Checkpoints on the Hugging Face Hub: pin a revision, read headers, fetch a snapshot.

Everything goes through huggingface_hub: its cache, its token, its session, its offline mode.
Only the headers of shards are read in our own way, by range requests: a few kilobytes each.
huggingface_hub is imported inside the functions, since it costs a third of a second.
"""

import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from drift_merge.errors import CheckpointError, SourceError
from drift_merge.storage.folder.contents import Folder, is_foreign_weight, sort_files
from drift_merge.storage.folder.faults import parse_config
from drift_merge.storage.headers import ShardHeader
from drift_merge.storage.hub.faults import (
    LIBRARY,
    download_command,
    is_offline,
    offline_error,
    patiently,
)
from drift_merge.storage.hub.ranges import shard_header
from drift_merge.storage.sources import Source
from drift_merge.storage.weight_map import (
    ADAPTER_CONFIG,
    INDEX,
    MAX_INDEX_BYTES,
    find_weights,
    parse_index,
    require_shards,
    shard_names,
)

# A file that (almost) every repository has. Fetching it by branch makes huggingface_hub remember
# the branch's commit in its cache, which is how offline mode finds it again.
_LANDMARKS = ("config.json", "prior.json", ADAPTER_CONFIG, "README.md", ".gitattributes")
_SIMULTANEOUS = 8  # requests; the answers are small, so the time is all latency
_FIRST_BYTES = 65_536  # of a shard whose number of tensors is not known
_ENTRY_BYTES = 112  # of one tensor in a header, its name excluded: dtype, shape, two offsets


class Headers(NamedTuple):
    """What a checkpoint on the Hub says of itself, without its weights."""

    config: dict[str, Any]  # config.json
    shards: dict[str, ShardHeader]  # by file name
    folder: Folder  # its other files


@dataclass(frozen=True, slots=True)
class _Weights:
    """The files that hold the weights, as listing and index name them."""

    shards: list[str]
    weight_map: dict[str, str]  # empty without an index

    @property
    def files(self) -> list[str]:
        return [*self.shards, INDEX] if self.weight_map else self.shards


def resolve_revision(source: Source) -> Source:
    """Pin a Hub source to the commit that its branch or tag names now.

    Args:
        source: of either kind; local and pinned sources come back unchanged.

    Returns:
        The source with `revision` of 40 hex digits. In offline mode it is the commit that the
        cache remembers for the branch.

    Raises:
        SourceError: no such model or revision, no right to read it, no answer, or offline
            and not in the cache.
    """
    if source.kind == "local" or source.is_pinned:
        return source
    if is_offline():
        return replace(source, revision=_cached_snapshot(source).name)
    commit, sizes = _ask_hub(source)
    landmark = next((name for name in _LANDMARKS if name in sizes), None)
    if landmark is not None:
        fetch_file(source, landmark)
    return replace(source, revision=commit)


def fetch_headers(source: Source) -> Headers:
    """Read config, shard headers and file list of a Hub checkpoint, without downloading shards.

    Shards that are in the cache are read there; of others only the header travels, several at
    once. In offline mode all must be in the cache.

    Raises:
        SourceError: as `resolve_revision`.
        CheckpointError: no safetensors weights, or a config, index or header that is broken,
            escapes the repository, or contradicts another.
    """
    source = resolve_revision(source)
    sizes = list_files(source)
    weights = _find_weights(source, sizes)
    config = _read_config(source, sizes)
    by_shard: dict[str, int] = {}
    for tensor, shard in weights.weight_map.items():
        by_shard[shard] = by_shard.get(shard, 1024) + len(tensor) + _ENTRY_BYTES
    read = [
        partial(shard_header, source, name, sizes[name], by_shard.get(name, _FIRST_BYTES))
        for name in weights.shards
    ]
    headers = _in_parallel(read)
    shards = {header.shard: header for header in headers}
    _check_index(weights.weight_map, shards, where=source.label)
    return Headers(config, shards, sort_files(sizes, weights.files))


class Snapshot(NamedTuple):
    """A checkpoint of the Hub in the Hub's cache."""

    path: Path  # directory of the commit, inside the cache
    folder: Folder  # the repository's other files; offline, those in the cache


def fetch_snapshot(source: Source, *, quiet: bool = False) -> Snapshot:
    """Download the weights and small sidecars of a Hub checkpoint into the Hub's cache.

    Second copies of the weights and states of training are left on the Hub, and so, until
    `fetch_sidecars` is told to, weights of other models that are carried over. A download that
    was cut goes on where it stopped. In offline mode nothing is asked and all must be there.

    Args:
        source: a Hub source, pinned or not.
        quiet: no progress bars of huggingface_hub.

    Raises:
        SourceError: as `resolve_revision`.
        OutputError: the cache cannot be written.
        CheckpointError: no safetensors weights, or an index that is broken or escapes.
    """
    from huggingface_hub import snapshot_download

    source = resolve_revision(source)
    sizes = list_files(source)
    weights = _find_weights(source, sizes)
    folder = sort_files(sizes, weights.files)
    small = [name for name in folder.carried if not is_foreign_weight(name)]
    wanted = [glob.escape(name) for name in (*weights.files, *small)]

    def download() -> Path:
        place: dict[str, Any] = {"revision": source.revision, "allow_patterns": wanted}
        return Path(snapshot_download(str(source.repo_id), library_name=LIBRARY, **place))

    with progress_bars(shown=not (quiet or is_offline())):
        directory = patiently(download, source, retry_answers=False)
    for name in weights.files:
        check_arrived(source, directory / name, name, sizes[name])
    return Snapshot(directory, folder)


def _ask_hub(source: Source) -> tuple[str, dict[str, int]]:
    """The commit of the source's revision, and the size in bytes of each file in it.

    -1 stands for a size that the answer does not give, as some mirrors do.
    """
    from huggingface_hub import HfApi, constants

    def ask() -> tuple[str | None, dict[str, int]]:
        info = HfApi(library_name=LIBRARY).model_info(
            str(source.repo_id),
            revision=source.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        return info.sha, {
            file.rfilename: -1 if file.size is None else file.size for file in info.siblings or []
        }

    commit, sizes = patiently(ask, source)
    if commit is None:
        raise SourceError(
            f"{source.label} has no commit: the repository is empty.",
            remedy=f"See what is in it: {constants.ENDPOINT}/{source.repo_id}",
        )
    return commit, sizes


def list_files(source: Source) -> dict[str, int]:
    """Every file of a pinned source with its size in bytes; offline, those in the cache."""
    if not is_offline():
        return _ask_hub(source)[1]
    directory = _cached_snapshot(source)
    files = (path for path in directory.rglob("*") if path.is_file())
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    if not any(name.endswith(".safetensors") for name in sizes):
        raise offline_error(source)
    return sizes


def _cached_snapshot(source: Source) -> Path:
    from huggingface_hub import try_to_load_from_cache

    for landmark in _LANDMARKS:
        path = try_to_load_from_cache(str(source.repo_id), landmark, revision=source.revision)
        if isinstance(path, str):
            return Path(path).parent
    raise offline_error(source)


def fetch_file(source: Source, name: str) -> Path:
    """Download one small file through the cache, without a progress bar."""
    from huggingface_hub import hf_hub_download

    def download() -> str:
        return hf_hub_download(
            str(source.repo_id), name, revision=source.revision, library_name=LIBRARY
        )

    with progress_bars(shown=False):
        return Path(patiently(download, source))


def _find_weights(source: Source, sizes: dict[str, int]) -> _Weights:
    name = str(source.repo_id).rpartition("/")[2]
    found = find_weights(
        sizes,
        where=source.label,
        directory=name,
        download=f"{download_command(source)} --local-dir {name}",
    )
    if found != [INDEX]:
        return _Weights(found, {})
    where = f"{source.label}: {INDEX}"
    if sizes[INDEX] > MAX_INDEX_BYTES:
        raise CheckpointError(
            f"{where} has {sizes[INDEX]:,} bytes; expected at most {MAX_INDEX_BYTES:,}.",
            remedy="This is not an index. Choose another revision of the model.",
        )
    weight_map = parse_index(fetch_file(source, INDEX).read_bytes(), where=where)
    shards = shard_names(weight_map)
    absent = next((shard for shard in shards if shard not in sizes), None)
    if absent is not None and is_offline():
        raise offline_error(source, absent)
    require_shards(shards, sizes, where=where)
    return _Weights(shards, weight_map)


def _read_config(source: Source, sizes: dict[str, int]) -> dict[str, Any]:
    where = f"{source.label}: config.json"
    if "config.json" not in sizes:
        raise CheckpointError(
            f"{source.label} has no config.json beside its weights.",
            remedy="Choose a repository in the Hugging Face format, config.json included.",
        )
    try:
        config = parse_config(fetch_file(source, "config.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where} is not JSON: {error}.", remedy="Choose another revision of the model."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{where} is not a JSON object.", remedy="Choose another revision of the model."
        )
    return config


def _check_index(weight_map: dict[str, str], shards: dict[str, ShardHeader], *, where: str) -> None:
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard].tensors:
            raise CheckpointError(
                f"{where}: {INDEX} says that {tensor} is in {shard}, but it is not.",
                remedy="The index and the shards are of different models: choose another revision.",
            )


def check_arrived(source: Source, path: Path, name: str, size: int) -> None:
    """Refuse a file of the cache that is absent, or of another size than the Hub says.

    Raises:
        SourceError: with the command that fetches it again.
    """
    found = path.stat().st_size if path.is_file() else 0
    if not path.is_file() or found != size >= 0:
        raise SourceError(
            f"{name} of {source.label} has {found:,} bytes in the cache; expected {size:,}.",
            remedy=f"Download it again: {download_command(source)} --force-download",
        )


def _in_parallel(calls: Sequence[Callable[[], ShardHeader]]) -> list[ShardHeader]:
    """Results in order. The first error stops what has not begun."""
    from concurrent.futures import ThreadPoolExecutor  # 10 ms, and only needed here

    with ThreadPoolExecutor(_SIMULTANEOUS, "hub-headers") as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """Switch huggingface_hub's bars off for a while; the user's own setting is left alone."""
    utils: Any = import_module("huggingface_hub.utils")  # re-exports that type checkers refuse
    if shown or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()

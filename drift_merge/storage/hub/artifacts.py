"""Priors and merges on the Hub: which files they have, with which hashes; fetch them by manifest.

An artifact is what its manifest names, and no more: shards, index, sidecars. Other files of the
repository are never fetched. huggingface_hub is imported inside the functions.
"""

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from drift_merge.errors import CheckpointError, SourceError
from drift_merge.storage.headers import ShardHeader
from drift_merge.storage.hub import models
from drift_merge.storage.hub.faults import LIBRARY, endpoint, is_offline, offline_error, patiently
from drift_merge.storage.hub.ranges import shard_header
from drift_merge.storage.listed import listed_files
from drift_merge.storage.sources import Source

PRIOR_MANIFEST = "prior.json"
MERGE_MANIFEST = "drift_merge.json"
WORDS = {PRIOR_MANIFEST: "drift prior", MERGE_MANIFEST: "merge of drift-merge"}
_FIRST_BYTES = 65_536  # of a shard, asked for at first
_PROGRAMS = {PRIOR_MANIFEST: "drift-prior", MERGE_MANIFEST: "drift-merge"}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a commit, as the Hub lists it."""

    size_bytes: int
    git_sha1: str  # of the file, or of the pointer that stands for it
    sha256: str | None = None  # of a large file (LFS, Xet)


def list_remote(source: Source) -> dict[str, RemoteFile]:
    """The files of a revision with their hashes, by path.

    Raises:
        SourceError: no such repository or revision, no right to see it, no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> dict[str, RemoteFile]:
        entries = HfApi(library_name=LIBRARY).list_repo_tree(
            str(source.repo_id), revision=source.revision, recursive=True
        )
        return {
            entry.path: RemoteFile(
                entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None
            )
            for entry in entries
            if isinstance(entry, RepoFile)  # and no folder
        }

    return patiently(ask, source)


def fetch_manifest(source: Source, manifest: str) -> tuple[Source, Path]:
    """Download the manifest of an artifact through the Hub's cache; no tensor travels.

    Args:
        source: a Hub source, pinned or not.
        manifest: PRIOR_MANIFEST or MERGE_MANIFEST.

    Returns:
        The source pinned to a commit, and the path of the manifest in the cache.

    Raises:
        SourceError: nothing there, no right, no answer; or it is no such artifact.
    """
    source = models.resolve_revision(source)
    if not is_offline():
        require_manifest(source, list_remote(source), manifest)
    return source, models.fetch_file(source, manifest)


def require_manifest(source: Source, files: Mapping[str, object], manifest: str) -> None:
    """Refuse a repository that does not hold this kind of artifact, saying what it does hold."""
    if manifest in files:
        return
    (other,) = set(WORDS) - {manifest}
    message = f"{source.label} is not a {WORDS[manifest]}: it has no {manifest}."
    if other in files:
        raise SourceError(
            f"{message} It is a {WORDS[other]}.",
            remedy=f"Look at it with: {_PROGRAMS[other]} inspect {source.given}",
        )
    if any(name.startswith("prior-") and name.endswith(".safetensors") for name in files):
        remedy = "Its upload has not been finished: the one who pushes it runs the command again."
    elif "config.json" in files:
        remedy = "It is a model. Use it as a REASONER or MLLM: drift-prior align REASONER MLLM"
    else:
        remedy = f"See what is in it: {endpoint()}/{source.repo_id}/tree/{source.revision}"
    raise SourceError(message, remedy=remedy)


def fetch_artifact(source: Source, manifest: str, *, quiet: bool = False) -> tuple[Source, Path]:
    """Download an artifact into the Hub's cache: the manifest and what it names.

    A download that was cut goes on with the file where it stopped. Nothing is verified but the
    sizes: the caller has the fingerprints.

    Args:
        source: a Hub source, pinned or not.
        manifest: PRIOR_MANIFEST or MERGE_MANIFEST.
        quiet: no progress bars of huggingface_hub.

    Returns:
        The source pinned to a commit, and the directory of that commit in the cache.

    Raises:
        SourceError: as `fetch_manifest`.
        CheckpointError: the manifest is broken, or names what the repository does not hold.
    """
    from huggingface_hub import snapshot_download

    source, path = fetch_manifest(source, manifest)
    names = read_listed(source, path)
    missing = [name for name in names if not (path.parent / name).is_file()]
    if not missing:
        return source, path.parent
    if is_offline():
        raise offline_error(source, missing[0])
    files = list_remote(source)
    require_files(source, names, files)

    def download() -> None:
        snapshot_download(
            str(source.repo_id),
            revision=source.revision,
            library_name=LIBRARY,
            allow_patterns=[glob.escape(name) for name in (manifest, *names)],
        )

    with models.progress_bars(shown=not quiet):
        patiently(download, source, retry_answers=False)
    for name in names:
        models.check_arrived(source, path.parent / name, name, files[name].size_bytes)
    return source, path.parent


def fetch_prior_headers(source: Source) -> tuple[Source, list[ShardHeader], Path]:
    """The headers of a prior's shards by range requests, and its manifest; kilobytes.

    Raises:
        SourceError, CheckpointError: as `fetch_artifact`.
    """
    source, path = fetch_manifest(source, PRIOR_MANIFEST)
    names = [n for n in read_listed(source, path) if n.endswith(".safetensors")]
    files = {} if is_offline() else list_remote(source)
    if files:
        require_files(source, names, files)
    sizes = {name: files[name].size_bytes if files else -1 for name in names}
    headers = [shard_header(source, name, size, _FIRST_BYTES) for name, size in sizes.items()]
    return source, headers, path


def read_listed(source: Source, manifest: Path) -> list[str]:
    """The files that a manifest of a Hub source vouches for; see `listed_files`."""
    where = f"{source.label}: {manifest.name}"
    try:
        content = json.loads(manifest.read_bytes())
        return listed_files(content, where=where)
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{where} cannot be read: {error}.", remedy="Choose another revision."
        ) from error


def require_files(source: Source, names: list[str], files: Mapping[str, object]) -> None:
    """Refuse an artifact whose manifest names files that its repository does not hold.

    Raises:
        CheckpointError: naming the first of them and their number.
    """
    missing = [name for name in names if name not in files]
    if missing:
        raise CheckpointError(
            f"{source.label} is incomplete: {len(missing):,} of the files that its manifest names "
            f"are not there, {missing[0]} first.",
            remedy="The one who pushed it runs the same push again, which completes it.",
        )

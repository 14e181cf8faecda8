"""What is sent: the files of an artifact in the order in which they may appear on the Hub.

Shards first, then what stands beside them, then the manifest, and the card at the very end, so
that a repository whose upload was cut never looks complete. Only files that the manifest names
are sent, and the card and licenses made for the occasion; a stray file of the directory is not.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from drift_merge.errors import SourceError
from drift_merge.storage.folder.scan import list_files
from drift_merge.storage.hub.artifacts import RemoteFile
from drift_merge.storage.listed import listed_files
from drift_merge.storage.manifests import seal, to_json

CARD = "README.md"
SIGNATURE = "drift_merge.sig"
SHARDS, BESIDE, MANIFEST, LAST = range(4)  # stages of an upload
COMMIT_FILES = 8  # shards of one commit at most: a kill loses at most one that was under way
COMMIT_BYTES = 20 * 10**9
_READ_BYTES = 2**22


@dataclass(frozen=True)
class PushFile:
    """One file to send: from the disk, or made for the occasion."""

    name: str  # in the repository
    content: Path | bytes
    stage: int  # SHARDS, BESIDE, MANIFEST or LAST

    @cached_property
    def size_bytes(self) -> int:
        """Its size."""
        return len(self.content) if isinstance(self.content, bytes) else _size(self.content)

    @cached_property
    def sha256(self) -> str:
        """What the Hub names it by if it is large."""
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def git_sha1(self) -> str:
        """What the Hub names it by if it is small: git's name of the blob."""
        digest = hashlib.sha1(b"blob %d\0" % self.size_bytes, usedforsecurity=False)
        for chunk in self._chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def equals(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub has this very file, by its size and hash."""
        if remote is None or remote.size_bytes != self.size_bytes:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        return remote.git_sha1 == self.git_sha1

    def _chunks(self) -> Iterable[bytes]:
        if isinstance(self.content, bytes):
            yield self.content
            return
        try:
            with open(self.content, "rb") as file:
                while chunk := file.read(_READ_BYTES):
                    yield chunk
        except OSError as error:
            raise _cannot_read(self.content, error) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _cannot_read(path, error) from error


def _cannot_read(path: Path, error: OSError) -> SourceError:
    return SourceError(
        f"{path} cannot be read: {error.strerror or error}.",
        remedy="Make or download the directory again, or push it from where it is whole.",
    )


def collect(
    directory: Path,
    manifest_name: str,
    manifest: Mapping[str, Any],
    made: Mapping[str, bytes],
) -> list[PushFile]:
    """The files of an artifact, in the order in which they are sent.

    Args:
        directory: of the artifact.
        manifest_name: prior.json or drift_merge.json.
        manifest: as it is published; see `published`.
        made: files made for the occasion by name, the card among them.

    Raises:
        CheckpointError: the manifest names a file outside its directory.
        SourceError: a file that it names cannot be read.
    """
    files = [
        PushFile(name, directory / name, SHARDS if name in manifest["shards"] else BESIDE)
        for name in listed_files(manifest, where=str(directory / manifest_name))
        if name not in made
    ]
    files += [PushFile(name, data, LAST if name == CARD else BESIDE) for name, data in made.items()]
    files.append(PushFile(manifest_name, to_json(dict(manifest)), MANIFEST))
    for file in files:
        _ = file.size_bytes  # a missing file is found now
    return sorted(files, key=lambda file: file.stage)


def hash_files(files: Iterable[PushFile], advance: Callable[[int], None]) -> None:
    """Hash every file, once; `advance` is called with the size of each that is done."""
    for file in files:
        _ = file.sha256
        advance(file.size_bytes)


def strays(directory: Path, files: Iterable[PushFile]) -> list[str]:
    """Files of the directory that are not sent, since the manifest does not name them."""
    return sorted(set(list_files(directory)) - {file.name for file in files})


def in_commits(files: Sequence[PushFile]) -> list[list[PushFile]]:
    """Group files to commits: shards by the dozen, all that stands beside them at once."""
    groups: list[list[PushFile]] = []
    for file in files:
        last = groups[-1] if groups else []
        if not last or last[0].stage != file.stage or _is_full(last):
            groups.append([])
        groups[-1].append(file)
    return groups


def _is_full(group: Sequence[PushFile]) -> bool:
    if group[0].stage != SHARDS:
        return False
    return len(group) >= COMMIT_FILES or sum(f.size_bytes for f in group) >= COMMIT_BYTES


def published(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest as the world may see it: local sources by their names, not by their paths.

    It is sealed anew, so that what is pulled verifies like any other.
    """
    sources = {role: _named(value) for role, value in manifest["sources"].items()}
    paths = {
        source["source"]: source["label"]
        for source in parents(manifest)
        if not source["repo_id"] and os.path.isabs(source["source"])
    }
    public = {
        key: value if key == "tensors" else _renamed(value, paths)
        for key, value in ({**manifest, "sources": sources}).items()
        if key != "seal"
    }
    return seal(public)


def parents(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sources of a manifest: the mllm first, then the reasoners, then the base."""
    sources = manifest["sources"]
    reasoners = sources["reasoners"] if "reasoners" in sources else [sources["reasoner"]]
    base = [sources["base"]] if "base" in sources else []
    return [sources["mllm"], *reasoners, *base]


def title_of(manifest: Mapping[str, Any]) -> str:
    """What commits and a pull request are called; equal for equal artifacts, and no others."""
    mllm, *others = (source["label"] for source in parents(manifest))
    what = "Prior" if manifest["kind"] == "drift-prior" else "Merge"
    seal = str(manifest["seal"]).partition(":")[2][:8]
    return f"{what} of {' + '.join(others)} and {mllm} [{seal}]"[-190:]


def _named(source: Any) -> Any:
    """A source, or a list of them, without the path of a local one."""
    if isinstance(source, list):
        return [_named(each) for each in source]
    return source if source["repo_id"] else {**source, "source": source["label"]}


def _renamed(value: Any, paths: Mapping[str, str]) -> Any:
    """Plain data with every absolute path of a source replaced by its name."""
    if isinstance(value, dict):
        return {key: _renamed(each, paths) for key, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, paths) for each in value]
    if isinstance(value, str):
        for path in sorted(paths, key=len, reverse=True):
            value = value.replace(path, paths[path])
    return value

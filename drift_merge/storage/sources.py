"""Reads what the user wrote as a local path or a Hub id. Asks the disk, never the network."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from drift_merge.errors import CheckpointError, SourceError
from drift_merge.storage.weight_map import is_gguf, is_pickle, refuse_format

_COMMIT = re.compile(r"[0-9a-f]{40}")
# The Hub's own rules for names, kept here so that a typo costs neither an import nor a request.
_REPO_ID = re.compile(r"(?:\w[\w.-]*(?<![.-])/)?\w[\w.-]*(?<![.-])", re.ASCII)
_REVISION = re.compile(r"\w[\w./+-]*(?<![/.])", re.ASCII)
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint is. `path` is set if it is local, `repo_id` if it is on the Hub.

    An adapter of the Hub has both: it is small, and read in the Hub's cache.
    """

    given: str  # what the user wrote, for messages
    kind: Literal["local", "hub"]
    path: Path | None = None  # a directory, or one .safetensors file
    repo_id: str | None = None  # "org/name" or "name"
    revision: str | None = None  # branch, tag or commit (40 hex digits: pinned); None: the default

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a full commit hash, which can never move."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def label(self) -> str:
        """Short name for tables, cards and messages.

        `org/name`, `org/name@branch` or `org/name@1a2b3c4d` for the Hub; the directory's name for
        a directory; `directory/file` for a single file, since `model.safetensors` says nothing.
        """
        if self.path is not None and self.kind == "local":
            absolute = Path(os.path.abspath(self.path))
            is_file = absolute.suffix == ".safetensors" and absolute.is_file()
            return f"{absolute.parent.name}/{absolute.name}" if is_file else absolute.name or "/"
        if self.revision is None:
            return str(self.repo_id)
        return f"{self.repo_id}@{self.revision[:8] if self.is_pinned else self.revision}"


@dataclass(frozen=True, slots=True)
class RemoteShard:
    """One shard that is on the Hub and not on this disk."""

    repo_id: str
    revision: str  # commit, 40 hex digits
    file: str  # path in the repository
    file_bytes: int
    digest: str | None = None  # SHA-256 (64 hex digits) or git's SHA-1 (40); None where unknown

    @property
    def source(self) -> Source:
        """Where it is, for requests and messages."""
        given = f"{self.repo_id}@{self.revision}"
        return Source(given=given, kind="hub", repo_id=self.repo_id, revision=self.revision)

    @property
    def place(self) -> str:
        """A relative path, with `/`, in a folder that no other shard has."""
        folder = f"{self.repo_id}@{self.revision[:12]}/{self.file}".replace("/", "--")
        return f"{folder}/{self.file}"


def parse_source(text: str) -> Source:
    """Read `text` as an existing local path, else as a Hub id `org/name[@revision]`.

    Args:
        text: a directory, a `.safetensors` file with `config.json` beside it, or a Hub id.
            `~` is the home directory. A path that exists always wins over a Hub id.

    Returns:
        The source; a Hub revision is not pinned yet (`hub.resolve_revision` does that).

    Raises:
        SourceError: nothing there, and no valid Hub id; or it looks like a path and is not there.
        CheckpointError: the file exists and is of a format that is not read (pickle, GGUF).
    """
    if not text.strip():
        raise SourceError("The source is empty.", remedy="Give a directory or a Hub id org/name.")
    path = _expand(text)
    if os.path.isdir(path):
        return Source(given=text, kind="local", path=path)
    if os.path.isfile(path):
        return _single_file(text, path)
    if os.path.lexists(path):
        raise SourceError(
            f"{text} is neither a directory nor a regular file (a dangling link, or a device).",
            remedy=f"See what it is: ls -l {quote(text)}",
        )
    if _looks_like_path(text):
        raise SourceError(
            f"No such path: {text} (looked at {os.path.abspath(path)}).",
            remedy="Check the spelling. A Hub id has the form org/name or org/name@revision.",
        )
    return _hub_id(text)


def mistaken_path(text: str) -> str:
    """The absolute path that a Hub id may have been meant for; "" where nothing speaks for it.

    It has no `/`, or stands below a directory that is here.
    """
    source = parse_source(text)
    repo_id = str(source.repo_id)
    organization = repo_id.rpartition("/")[0]
    is_likely = source.kind == "hub" and (not organization or os.path.isdir(organization))
    return os.path.abspath(text) if is_likely else ""


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise SourceError(
            f"{text}: {error}", remedy="Write the path without ~, or ./~ for a file of that name."
        ) from error


def _single_file(text: str, path: Path) -> Source:
    if is_pickle(path.name) or is_gguf(path.name):
        refuse_format([path.name], where=text, directory=str(path.parent))
    if path.suffix != ".safetensors":
        raise SourceError(
            f"{text} is a file, but not a .safetensors file.",
            remedy=f"Give the checkpoint's directory: {path.parent}",
        )
    if not os.path.isfile(path.parent / "config.json"):
        raise CheckpointError(
            f"{text} has no config.json beside it.",
            remedy=f"Copy the model's config.json into {path.parent}",
        )
    return Source(given=text, kind="local", path=path)


def _looks_like_path(text: str) -> bool:
    starts = text.startswith(("./", "../", "/", "~")) or text in (".", "..")
    before_revision = text.partition("@")[0]
    several = before_revision.count("/") > 1 or before_revision.endswith("/") or "\\" in text
    return starts or several or text.endswith(_WEIGHT_SUFFIXES)


def _hub_id(text: str) -> Source:
    repo_id, at, revision = text.partition("@")
    is_name = _REPO_ID.fullmatch(repo_id) and not re.search(r"--|\.\.|\.git$", repo_id)
    if not is_name or len(repo_id) > 96:
        raise SourceError(
            f"{text!r} is neither an existing path nor a Hub id.",
            remedy="Give an existing directory, or an id of the form org/name or org/name@revision "
            "(letters, digits, '-', '_' and '.').",
        )
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise SourceError(
            f"{text!r} is not an existing path, and {revision!r} is not a valid Hub revision.",
            remedy=f"Give a branch, a tag or a commit after the @, e.g. {repo_id}@main",
        )
    pinned = revision.lower() if _COMMIT.fullmatch(revision.lower()) else revision
    return Source(given=text, kind="hub", repo_id=repo_id, revision=pinned or None)

"""The files below a directory, links included that lead to a place within it."""

import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from drift_merge.errors import CheckpointError
from drift_merge.storage.folder.contents import Folder
from drift_merge.storage.folder.faults import MAX_POINTER_BYTES, cannot_open, refuse_pointer


class Scan(NamedTuple):
    """What lies below a directory, by relative paths with `/`, sorted."""

    files: dict[str, int]  # bytes of every file that can be looked at
    astray: dict[str, str]  # links that lead out of the directory, and where to; "" for nowhere


def scan(directory: Path) -> Scan:
    """Every file below a directory, hidden folders left out.

    Links count where they lead to a place within the directory, or to where its `config.json`
    is a link to: the Hub's cache is made of such links. Others are named as astray; those to
    files are listed too, since weights may lie on another disk.
    """
    real = os.path.realpath(directory)
    roots = [real, os.path.dirname(os.path.realpath(directory / "config.json"))]
    found = Scan({}, {})
    _walk(directory, "", roots, found)
    return Scan(dict(sorted(found.files.items())), dict(sorted(found.astray.items())))


def _walk(folder: Path, prefix: str, roots: list[str], found: Scan) -> None:
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise cannot_open(str(folder), folder, error) from error
    for entry in listed:
        try:
            _look(entry, prefix + entry.name, roots, found)
        except OSError as error:
            raise cannot_open(prefix + entry.name, Path(entry.path), error) from error


def _look(entry: "os.DirEntry[str]", name: str, roots: list[str], found: Scan) -> None:
    path = Path(entry.path)
    if entry.is_symlink() and not _is_within(os.path.realpath(path), roots):
        found.astray[name] = os.path.realpath(path) if path.exists() else ""
        is_file = path.is_file()
    elif path.is_dir():
        is_file = False
        # A link to a folder above itself would never end; what is there is listed anyway.
        is_loop = entry.is_symlink() and _is_within(
            os.path.realpath(path.parent), [os.path.realpath(path)]
        )
        if not entry.name.startswith(".") and not is_loop:
            _walk(path, f"{name}/", roots, found)
    else:
        is_file = path.is_file()
        if not is_file and entry.is_symlink():
            found.astray[name] = ""
    if is_file:
        found.files[name] = path.stat().st_size


def _is_within(target: str, roots: list[str]) -> bool:
    return any(target == root or target.startswith(root.rstrip("/") + "/") for root in roots)


def list_files(directory: Path) -> list[str]:
    """Every file below a directory, as sorted paths relative to it, with `/`; see `scan`."""
    return list(scan(directory).files)


def require_carried(directory: Path, folder: Folder, label: str) -> None:
    """Refuse, before any work, a folder whose files cannot be carried over as they are.

    Args:
        directory: where they are.
        folder: the account of its files.
        label: the checkpoint in the user's words.

    Raises:
        CheckpointError: a link that leads elsewhere, a git-lfs pointer, or an unreadable file.
    """
    _refuse_astray(directory, folder.astray, label)
    for name, size in folder.carried.items():
        path = directory / name
        if 0 <= size <= MAX_POINTER_BYTES:
            refuse_pointer(f"{label}: {name}", path)
        elif not os.access(path, os.R_OK):
            raise cannot_open(f"{label}: {name}", path, PermissionError(13, "Permission denied"))


def _refuse_astray(directory: Path, astray: Mapping[str, str], label: str) -> None:
    if not astray:
        return
    name, target = next(iter(astray.items()))
    path = quote(str(directory / name))
    more = f" {len(astray) - 1:,} more links do so too." if len(astray) > 1 else ""
    copied = f"cp -rL {path} {path}.new && unlink {path} && mv {path}.new {path}"
    raise CheckpointError(
        f"{label}: {name} is a link to {target}, outside the folder; it would be published with "
        f"the output.{more}",
        remedy=f"If it belongs to the model, put what it leads to in its place: {copied}",
    )

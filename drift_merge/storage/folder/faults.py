"""Files of a checkpoint that cannot be read, or are not what their name says: the way out."""

import errno
import json
from math import isfinite
from pathlib import Path
from shlex import quote
from typing import Any

from drift_merge.errors import CheckpointError
from drift_merge.storage.folder.limits import file_limits

# Git stores a large file as a few lines that name it; https://github.com/git-lfs/git-lfs
_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_POINTER_BYTES = 1024  # the limit of the specification

# Takes one tensor out of a shard; the file as it was is kept.
_TAKE_OUT = (
    "Keep both files: each holds other tensors too. If the index is right, write the other one "
    "again without this tensor (the old file stays, as .bak):\n"
    '  python -c "import sys, os; from safetensors.torch import load_file, save_file; '
    "t = load_file(sys.argv[1]); t.pop(sys.argv[2]); os.rename(sys.argv[1], sys.argv[1] + '.bak'); "
    "save_file(t, sys.argv[1], metadata={{'format': 'pt'}})\" {} {}"
)


def cannot_open(label: str, path: Path, error: OSError) -> CheckpointError:
    """The CheckpointError for a file that is there and cannot be read.

    Args:
        label: the file in the user's words.
        path: of it.
        error: what the system said.
    """
    remedy = f"Check that the file exists and is readable: ls -lL {quote(str(path))}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = too_many_files_remedy()
    return CheckpointError(f"{label} cannot be read: {error.strerror or error}.", remedy=remedy)


def too_many_files_remedy() -> str:
    """The way out where the system refuses to open one more file."""
    soft, hard = file_limits()
    wanted = f"ulimit -n {hard}" if hard > soft else "ulimit -Hn   (an administrator can raise it)"
    return f"This shell allows {soft:,} open files. Allow more, then run it again: {wanted}"


def is_pointer(begin: bytes) -> bool:
    """Whether a file that begins so stands for another that git-lfs has not fetched."""
    return begin.startswith(_POINTER)


def pointer_error(label: str, path: Path) -> CheckpointError:
    """The CheckpointError for a git-lfs pointer in place of the file `path`."""
    return CheckpointError(
        f"{label} is a git-lfs pointer: the file itself has not been downloaded.",
        remedy=f"Fetch what the repository points to: cd {quote(str(path.parent))} && git lfs pull",
    )


def refuse_pointer(label: str, path: Path) -> None:
    """Raise CheckpointError where a small file is a git-lfs pointer, or cannot be read."""
    try:
        with open(path, "rb") as file:
            if is_pointer(file.read(len(_POINTER))):
                raise pointer_error(label, path)
    except OSError as error:
        raise cannot_open(label, path, error) from error


def in_two_shards(
    given: str, directory: Path | None, name: str, shards: tuple[str, str], named: str | None
) -> CheckpointError:
    """The CheckpointError for a tensor in two shards. Neither may be deleted: both hold others.

    Args:
        given: the checkpoint in the user's words.
        directory: where it is; None on the Hub.
        name: of the tensor.
        shards: that hold it.
        named: the one that the index names for it, if there is one.
    """
    said = f"the index names {named}" if named else "no index says which of them counts"
    message = f"{given}: {name} is in two shards, {shards[0]} and {shards[1]}; {said}."
    if directory is None or named not in shards:
        remedy = "Keep both files, and download or save the checkpoint again into a new directory."
        return CheckpointError(message, remedy=remedy)
    other = directory / next(shard for shard in shards if shard != named)
    return CheckpointError(message, remedy=_TAKE_OUT.format(quote(str(other)), quote(name)))


def parse_config(data: bytes) -> Any:
    """JSON in which NaN, Infinity and numbers beyond float64 are unknown, so None.

    The JSON standard has no such numbers; Python writes and reads them all the same.

    Raises:
        ValueError, RecursionError: not JSON.
    """
    return json.loads(data, parse_constant=lambda _: None, parse_float=_finite)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if isfinite(value) else None

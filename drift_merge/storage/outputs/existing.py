"""What lies where an output is to be: refused, or replaced where the user asked for it."""

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from drift_merge.errors import OutputError
from drift_merge.storage.copying import write_file
from drift_merge.storage.journal import read_journal
from drift_merge.storage.shards import cannot_read

TOGETHER = "together.json"  # beside the last of several outputs, while their leftovers are removed
Overwrite = bool | Literal["any"]  # True: what this package has made


def check_output(out: Path, inputs: Iterable[Path], *, overwrite: Overwrite) -> None:
    """Refuse an output that exists, or that could destroy an input or the place we work in.

    Args:
        out: the directory to be created.
        inputs: local directories that are read.
        overwrite: an existing `out` may be replaced: True if it is ours, "any" whatever it is.

    Raises:
        OutputError: naming the clash.
    """
    final = real(out)
    if real(Path()).is_relative_to(final):
        raise OutputError(
            f"the output {out} is or holds the working directory, which would be replaced.",
            remedy="Choose a new directory with -o, such as -o out",
        )
    for path in inputs:
        source = real(path)
        if final == source or final.is_relative_to(source) or source.is_relative_to(final):
            where = "is" if final == source else "is inside" if source in final.parents else "holds"
            raise OutputError(
                f"the output {out} {where} the input {path}; writing there could destroy it.",
                remedy="Choose a directory outside every input with -o.",
            )
    if finished_plan(out) is None:  # else the run itself finds out whether it was this very plan
        refuse_existing(out, overwrite=overwrite)


def real(path: Path) -> Path:
    """A path with all its links followed, of something that may not exist."""
    return Path(os.path.realpath(path))


def refuse_existing(out: Path, *, overwrite: Overwrite) -> None:
    """Refuse to write where something is, unless it may be replaced.

    Raises:
        OutputError: naming it.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise OutputError(
            f"{out} exists and is not a directory.", remedy="Choose another name with -o."
        )
    if not overwrite and _holds_anything(out):
        raise OutputError(
            f"{out} exists already.",
            remedy="Choose another directory with -o, or replace it: add --overwrite.",
        )
    if overwrite is True and _holds_anything(out) and not _is_ours(out):
        raise OutputError(
            f"{out} holds files, and none of them says that drift_merge has made it.",
            remedy="Choose another directory with -o, or replace it all the same: --overwrite=any",
        )


def _is_ours(directory: Path) -> bool:
    """Whether a manifest of ours lies there: a JSON object whose tool is this package."""
    for path in directory.glob("*.json"):
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        tool = value.get("tool") if isinstance(value, dict) else None
        if isinstance(tool, dict) and tool.get("name") == "drift_merge":
            return True
    return False


def _holds_anything(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except OSError as error:
        raise cannot_read(directory, error) from error


def finished_plan(out: Path) -> str | None:
    """The plan of a run that was killed after publishing `out`, before it tidied up."""
    partial = partial_of(out)
    if not out.is_dir() or (partial / "payload").exists():
        return None
    return read_journal(partial / "journal.jsonl")[0] or _plan_beside(real(out))


def note_together(outputs: Sequence[tuple[Path, str]]) -> None:
    """Say beside the last of several outputs, published under these plans, that all are there.

    Their leftovers go one by one, that of the last at the end; a run that is killed meanwhile is
    known by this note. An output that somebody has replaced since is not what was noted.

    Raises:
        OutputError: an output is gone, or the note cannot be written.
    """
    note = {}
    for final, plan in [(real(out), plan) for out, plan in outputs]:
        try:
            note[final.name] = [plan, final.stat().st_ino]
        except OSError as error:
            raise cannot_read(final, error) from error
    write_file(partial_of(outputs[-1][0]) / TOGETHER, json.dumps(note).encode())


def _plan_beside(final: Path) -> str | None:
    for path in final.parent.glob(f"*.partial/{TOGETHER}"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there any more, or torn
            plan, inode = json.loads(path.read_bytes())[final.name]
            if inode == final.stat().st_ino:
                return str(plan)
    return None


def partial_of(out: Path) -> Path:
    """Where the unfinished state of `out` lives: beside it (links followed), `NAME.partial`."""
    final = real(out)
    return final.parent / f"{final.name}.partial"

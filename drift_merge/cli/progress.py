"""Progress on stderr: a bar on a terminal, a line every tenth elsewhere, nothing when quiet."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from drift_merge.cli.render import note, size

SHOWN_BYTES = 10**8  # anything smaller is over before it could be read
Advance = Callable[[int], None]  # bytes done since the last call


@contextmanager
def progress(label: str, total_bytes: int, *, quiet: bool) -> Iterator[Advance]:
    """A callback for bytes done; safe to call from any thread.

    Args:
        label: what is being done, one word.
        total_bytes: of all of it.
        quiet: show nothing.
    """
    if quiet or total_bytes < SHOWN_BYTES:
        yield lambda _size: None
    elif sys.stderr.isatty():
        yield from _bar(label, total_bytes)
    else:
        yield _lines(label, total_bytes)


def _bar(label: str, total_bytes: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total_bytes)
        yield lambda size: bar.advance(task, size)


def _lines(label: str, total_bytes: int) -> Advance:
    done = 0
    lock = threading.Lock()

    def advance(more: int) -> None:
        nonlocal done
        with lock:
            before, done = done, done + more
            tenth = 10 * done // max(total_bytes, 1)
            if tenth > 10 * before // max(total_bytes, 1):
                note(f"{label}: {10 * tenth:3d}% of {size(total_bytes)}")

    return advance

"""Progress on stderr: a bar on a terminal, a line every tenth elsewhere, nothing when quiet."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from drift_merge.cli.render import note, size

LABELS = {"stream": "Streaming", "verify": "Verifying"}
SHOWN_BYTES = 10**8  # anything smaller is over before it could be read
Advance = Callable[[str, int], None]  # phase, bytes


@contextmanager
def progress(total_bytes: int, *, quiet: bool) -> Iterator[Advance]:
    """A callback for bytes done; safe to call from any thread.

    Args:
        total_bytes: of one phase.
        quiet: show nothing.
    """
    if quiet or total_bytes < SHOWN_BYTES:
        yield lambda _phase, _size: None
    elif sys.stderr.isatty():
        yield from _bar(total_bytes)
    else:
        yield _lines(total_bytes)


def _bar(total_bytes: int) -> Iterator[Advance]:
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
        tasks = {}

        def advance(phase: str, done: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(LABELS.get(phase, phase), total=total_bytes)
            bar.advance(tasks[phase], done)

        yield advance


def _lines(total_bytes: int) -> Advance:
    done: dict[str, int] = {}
    lock = threading.Lock()

    def advance(phase: str, more: int) -> None:
        with lock:
            before = done.get(phase, 0)
            done[phase] = before + more
            tenth = 10 * done[phase] // max(total_bytes, 1)
            if tenth > 10 * before // max(total_bytes, 1):
                label = LABELS.get(phase, phase)
                note(f"{label}: {10 * tenth:3d}% of {size(total_bytes)}")

    return advance

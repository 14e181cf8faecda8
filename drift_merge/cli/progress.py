"""Progress on stderr: a bar on a terminal, a line every tenth elsewhere, nothing when quiet."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from drift_merge.cli.render import note
from drift_merge.storage.sizes import size

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
    with progresses({label: total_bytes}, quiet=quiet) as (advance,):
        yield advance


@contextmanager
def progresses(totals: Mapping[str, int], *, quiet: bool) -> Iterator[tuple[Advance, ...]]:
    """Callbacks for things that go on at the same time; see `progress`.

    Args:
        totals: bytes of all of it, by label.
        quiet: show nothing.
    """
    if quiet or max(totals.values()) < SHOWN_BYTES:
        yield tuple(lambda _size: None for _ in totals)
    elif sys.stderr.isatty():
        yield from _bars(totals)
    else:
        yield tuple(_lines(label, total) for label, total in totals.items())


def _bars(totals: Mapping[str, int]) -> Iterator[tuple[Advance, ...]]:
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
        tasks = [bar.add_task(label, total=total) for label, total in totals.items()]
        yield tuple(partial(bar.advance, task) for task in tasks)


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

"""Progress of what huggingface_hub does out of sight: the bytes that have arrived in a folder."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

_PERIOD_SECONDS = 0.2
# Label and bytes of a task -> a context that yields what takes the bytes done since the last call.
ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def no_progress(_label: str, _total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress that shows nothing."""
    return nullcontext(lambda _: None)


@contextmanager
def watched(folder: Path, advance: Callable[[int], None]) -> Iterator[None]:
    """Call `advance` with the bytes by which a folder grows, some times a second.

    It works for any way in which the client may fetch a file. What a failed attempt takes back
    is not counted twice.
    """
    seen = _size(folder)
    done = threading.Event()

    def look() -> None:
        nonlocal seen
        found = _size(folder)
        if found > seen:
            advance(found - seen)
            seen = found

    def watch() -> None:
        while not done.wait(_PERIOD_SECONDS):
            look()

    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue  # it was moved in between
    return total

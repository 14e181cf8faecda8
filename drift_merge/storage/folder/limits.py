"""How many files may be open at a time, and descriptors that keep to it."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# Python, torch, the journal, pipes to workers, files that are opened and closed in passing.
_RESERVED = 48


def file_limits() -> tuple[int, int]:
    """Open files that this process may have now, and may allow itself: `ulimit -n`, `-Hn`."""
    found = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (2**20 if n == resource.RLIM_INFINITY else n for n in found)
    return soft, hard


def share_of_files(parts: int) -> int:
    """How many files each of `parts` users may hold open at a time; at least 2."""
    return max(2, (file_limits()[0] - _RESERVED) // (2 * max(1, parts)))  # inputs and outputs


class Recent(Generic[T]):
    """What was opened, by name; beyond a number the longest unused is let go.

    What is let go is closed when its last user forgets it: hold what `get` returns while in use.
    Safe to share between threads.
    """

    def __init__(self, limit: int, leave: Callable[[T], None] = lambda _: None) -> None:
        self._limit, self._leave = limit, leave
        self._open: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str, make: Callable[[], T]) -> T:
        """What is open under a name; made now if nothing is."""
        with self._lock:
            found = self._open.get(name)
            if found is None:
                while len(self._open) >= self._limit:
                    self._leave(self._open.popitem(last=False)[1])
                found = self._open[name] = make()
            self._open.move_to_end(name)
            return found

    def find(self, name: str) -> T | None:
        """What is open under a name, if anything is."""
        with self._lock:
            return self._open.get(name)

    def drop(self, name: str) -> T | None:
        """Let go of one; returns it, if it was there."""
        with self._lock:
            return self._open.pop(name, None)

    def clear(self) -> None:
        """Let go of all."""
        with self._lock:
            self._open.clear()

    def names(self) -> list[str]:
        """What is open now."""
        with self._lock:
            return list(self._open)


class Descriptor:
    """An open file that is closed when nobody holds it any more."""

    __slots__ = ("number",)

    def __init__(self, path: str | os.PathLike[str], flags: int) -> None:
        self.number = -1
        self.number = os.open(path, flags | os.O_CLOEXEC, 0o644)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # At the interpreter's end this module has no `os` any more.
        if self.number >= 0:
            close(self.number)

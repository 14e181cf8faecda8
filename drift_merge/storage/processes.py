"""Child processes: forked, ended with their parent; errors that survive the way between them."""

import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any, NoReturn

from drift_merge.errors import DriftMergeError

_PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(slots=True)
class Child:
    """A process and the parent's end of its connection."""

    process: int
    connection: "Connection[Any, Any]" = field(repr=False)


def num_cores() -> int:
    """The number of cores this process may use: a container's, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork() -> bool:
    """Only Linux forks a process with torch in it safely and ends a child with its parent."""
    return sys.platform == "linux" and hasattr(os, "fork")


def fork(serve: Callable[["Connection[Any, Any]"], None], others: Sequence[Child] = ()) -> Child:
    """Start a child that calls `serve` with its end of a connection, and ends when that returns.

    Args:
        serve: what it does. Ctrl-C does not reach it.
        others: children of which this one must not keep the parent's end.
    """
    ours, theirs = Pipe()
    parent = os.getpid()
    # Ctrl-C just after the fork would lead the child through the parent's way out.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        with warnings.catch_warnings():
            # Python warns of other threads, which a child that starts none and ends by _exit may
            # ignore: torch runs on one thread there, and nothing is printed.
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
        if process == 0:
            _live(parent, serve, [ours, *(other.connection for other in others)], theirs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    return Child(process, ours)


def _live(
    parent: int,
    serve: Callable[["Connection[Any, Any]"], None],
    foreign: Sequence["Connection[Any, Any]"],
    own: "Connection[Any, Any]",
) -> NoReturn:
    """The life of a child."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with(parent)
        for connection in foreign:
            connection.close()  # or they would outlive the parent's end
        serve(own)
    finally:
        os._exit(0)


def die_with(parent: int) -> None:
    """Have the kernel end this process when the parent ends, however that happens."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def portable(error: BaseException) -> BaseException:
    """An error that survives the way to the parent, with the child's traceback as its cause."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    return error if isinstance(error, DriftMergeError) else _Remote(error, text)


class _Remote(Exception):
    """Carries an error of a child; arrives as that error, caused by its traceback."""

    def __init__(self, error: BaseException, text: str) -> None:
        super().__init__(text)
        self.error, self.text = error, text

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.error, self.text)


def _arrive(error: BaseException, text: str) -> BaseException:
    error.__cause__ = RuntimeError(text)
    return error

"""The workers of a run: threads, or on a CPU processes where the work is worth them.

A merge method is dozens of short calls into torch per chunk. Each gives the interpreter's lock up
and takes it back, so that two threads mostly wait for each other: measured with DARE on two cores,
two threads were no faster than one, two processes were twice as fast. A GPU queues its work and
has one memory, so that threads serve it.
"""

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from drift_merge.engine.context import Stopped, WorkerContext
from drift_merge.engine.steps import Bundle, Made, run_bundle
from drift_merge.errors import DriftMergeError
from drift_merge.storage.processes import Child, can_fork, fork, portable

# Below this, starting processes costs more than it saves.
PROCESS_BYTES = 64 * 2**20
_PATIENCE_SECONDS = 0.02  # between two looks at whether shards have arrived for an idle process


class Workers(Protocol):
    """Runs bundles; made once, iterated once, then stopped."""

    def __iter__(self) -> Iterator[list[Made]]:
        """Results as they come; raises what a worker met."""

    def stop(self) -> list[list[Made]]:
        """End all workers, whatever they do; returns the results nobody has taken."""


def start(run: WorkerContext, bundles: Sequence[Bundle], count: int) -> Workers:
    """Start workers on bundles.

    Args:
        run: what they share.
        bundles: in the order in which they are begun.
        count: of workers, at least 1.
    """
    work_bytes = sum(target.info.size_bytes for bundle in bundles for target in bundle)
    alone = count == 1 or len(bundles) == 1
    if alone or run.device.type != "cpu" or work_bytes < PROCESS_BYTES or not can_fork():
        return _Threads(run, bundles, count)
    return _Processes(run, bundles, min(count, len(bundles)))


class _Threads:
    """Workers as threads of this process."""

    def __init__(self, run: WorkerContext, bundles: Sequence[Bundle], count: int) -> None:
        self._run, self._bundles = run, iter(bundles)
        self._queue: SimpleQueue[list[Made] | BaseException | None] = SimpleQueue()
        self._workers = [Thread(target=self._work) for _ in range(count)]

    def __iter__(self) -> Iterator[list[Made]]:
        for worker in self._workers:
            worker.start()
        for _ in self._workers:
            while (message := self._queue.get()) is not None:
                if isinstance(message, BaseException):
                    raise message
                yield message

    def stop(self) -> list[list[Made]]:
        self._run.stop.set()
        for worker in self._workers:
            if worker.ident is not None:
                worker.join()
        left = []
        while not self._queue.empty():
            message = self._queue.get()
            if isinstance(message, list):
                left.append(message)
        return left

    def _work(self) -> None:
        """Take the next bundle until there is none; None says goodbye."""
        try:
            while not self._run.stop.is_set():
                with self._run.lock:
                    bundle = next(self._bundles, None)
                if bundle is None:
                    break
                with self._run.borrow(bundle[0].step.name, len(bundle)):
                    made = run_bundle(self._run, bundle)
                self._queue.put(made)
        except Stopped:
            pass
        except BaseException as error:
            self._run.stop.set()
            self._queue.put(error)
        self._queue.put(None)


class _SharedFlag:
    """An event that parent and children see: one byte of shared memory."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._byte[0] = 1

    def is_set(self) -> bool:
        return self._byte[0] == 1


class _Processes:
    """Workers as forked processes: each has its own lock, workspace and maps.

    The files of the outputs are open already, and every byte has a fixed place in them.

    From a child: an int is bytes written, None asks for work, a list is a result, an exception
    the end. To a child: the number of a bundle, or None when there is none.
    """

    def __init__(self, run: WorkerContext, bundles: Sequence[Bundle], count: int) -> None:
        self._progress = run.progress
        self._flag = _SharedFlag()
        self._run = replace(run, stop=self._flag)
        self._bundles = bundles
        self._next = 0  # number of the next bundle
        self._children: list[Child] = []
        self._count = count

    def __iter__(self) -> Iterator[list[Made]]:
        for _ in range(self._count):
            self._children.append(fork(self._serve, self._children))
        active = {child.connection: child for child in self._children}
        idle: list[Child] = []
        while active:
            for connection in wait(list(active), _PATIENCE_SECONDS if idle else None):
                child = active[connection]  # type: ignore[index]
                message = self._message(child)
                if message is None:
                    idle.append(child)
                elif isinstance(message, list):
                    self._run.downloads.give_back(message[0][1], len(message))
                    yield message
            while idle and self._is_next_here():
                child = idle.pop()
                if self._next < len(self._bundles):
                    child.connection.send(self._next)
                    self._next += 1
                else:
                    child.connection.send(None)
                    del active[child.connection]

    def _is_next_here(self) -> bool:
        """Whether the next bundle can begin: its shards are on this disk, or there is no next."""
        if self._next == len(self._bundles):
            return True
        return self._run.downloads.is_here(self._bundles[self._next][0].step.name)

    def stop(self) -> list[list[Made]]:
        self._flag.set()
        left = []
        for child in self._children:
            with suppress(OSError), child.connection as connection:
                connection.send(None)  # for one that asks, or will
                with suppress(EOFError):
                    while True:
                        message = connection.recv()
                        if isinstance(message, list):
                            left.append(message)
            if child.process:
                os.waitpid(child.process, 0)
        return left

    def _message(self, child: Child) -> Any:
        """The next message; a number of bytes is passed on, an exception raised."""
        try:
            message = child.connection.recv()
        except EOFError:
            raise self._death(child) from None
        if isinstance(message, int):
            self._progress(message)
        if isinstance(message, BaseException):
            raise message
        return message

    def _death(self, child: Child) -> DriftMergeError:
        """Why a child ended without a word."""
        _, status = os.waitpid(child.process, 0)
        child.process = 0
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = (
            f"by signal {number}" if number else f"with status {os.waitstatus_to_exitcode(status)}"
        )
        return DriftMergeError(
            f"A worker process was ended {how}; signal 9 is usually the system out of memory.",
            remedy="Run the same command again with --threads 1: it resumes where it stopped.",
        )

    def _serve(self, connection: "Connection[Any, int | None]") -> None:
        """What a child does until there is no work."""
        run = replace(
            self._run,
            progress=connection.send,
            lock=threading.Lock(),
            local=threading.local(),
        )
        run.inputs.drop_remote()
        try:
            while not run.stop.is_set():
                connection.send(None)
                number = connection.recv()
                if number is None:
                    return
                run.downloads.adopt(self._bundles[number][0].step.name)
                made = run_bundle(run, self._bundles[number])
                run.inputs.drop_remote()  # the parent may delete them as soon as it knows
                connection.send(made)
        except Stopped:
            return
        except BaseException as error:
            run.stop.set()
            connection.send(portable(error))

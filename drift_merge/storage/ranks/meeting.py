"""The ranks of one command: they wait for each other, exchange plain values, and fail as one.

All goes through the store of torch.distributed, which torchrun serves, except the sum of tensors,
which is one collective (gloo, or nccl where the device is cuda). No wait is blind: a failure of
any rank, or its loss, ends every wait of the others.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drift_merge.errors import DriftMergeError, SourceError
from drift_merge.storage.ranks import watch
from drift_merge.storage.ranks.environment import Place
from drift_merge.storage.ranks.failures import INTERRUPTED, NOBODY, Failure, lost

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

JOIN_SECONDS = 300.0  # for all ranks to import torch from a cold disk
_VERDICT_SECONDS = 5.0  # for the watch, or torchrun, to say what has broken a collective
_LEAVE_SECONDS = 10.0  # for the others to put down their work after a failure


class Ranks:
    """The ranks of one command, seen from one of them; `ALONE` without torchrun.

    `join` before anything else; nothing is imported or connected earlier.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rank, self.size = place.rank, place.size
        self.is_first = place.rank == 0
        self.is_joined = place.size == 1
        self.is_together = False  # a failure of one is a failure of all
        self._host = socket.gethostname() if place.size > 1 else ""
        self._voice = sys.stderr
        self._store: Any = None
        self._watch: watch.Watch | None = None
        self._ended: Failure | None = None  # what all end with
        self._who: list[tuple[str, int]] = []  # host and process of each
        self._count = 0  # of the exchanges so far, equal on all ranks
        self._progress: Callable[[int], None] = lambda _: None

    def begin(self) -> None:
        """From here on all ranks do one thing: the first speaks, a failure of one ends all."""
        if self.size > 1:
            self.is_together = True
            if not self.is_first:
                self._voice = sys.stderr
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    def speak(self) -> None:
        """Of a rank that is to say what the first cannot: its errors are heard again."""
        sys.stderr = self._voice

    def join(self) -> None:
        """Meet the others.

        Raises:
            SourceError: some did not come.
        """
        if self.is_joined:
            return
        # The end of a rank is told by us, not by warnings of sockets with a stack in C++.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]
        from torch.distributed.rendezvous import rendezvous

        try:
            found = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        except (RuntimeError, ValueError) as error:
            raise self._alone(str(error)) from error
        self._store = PrefixStore("drift_merge", found[0])
        self.is_joined = True
        others = range(1, self.size) if self.is_first else [0]
        self._watch = watch.Watch(
            self._store, self.rank, others, lambda n: self._progress(n), self._is_gone
        )
        self._store.set(f"who/{self.rank}", json.dumps([self._host, os.getpid()]))
        signal.signal(signal.SIGTERM, self._terminated)
        self._store.add("joined", 1)
        if not self._poll(lambda: self._store.add("joined", 0) >= self.size, JOIN_SECONDS):
            raise self._alone(f"{self._store.add('joined', 0)} of {self.size} ranks came")
        keys = [f"who/{rank}" for rank in range(self.size)]
        self._who = [json.loads(self._store.get(key)) for key in keys]
        self._watch.start()

    def _alone(self, why: str) -> SourceError:
        return SourceError(
            f"the ranks of torchrun did not meet: {why}.",
            remedy="See that every host can reach MASTER_ADDR:MASTER_PORT of the first. A command "
            "that is to run by itself inside a job of torchrun: env -u TORCHELASTIC_RUN_ID ...",
        )

    def _poll(self, is_true: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Wait until something is so; False after some seconds."""
        end, pause = time.monotonic() + seconds, 0.001
        while not is_true():
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return True

    def share(self, value: Any) -> Any:
        """The value (plain data) of the first rank, on every rank."""
        return value if self.size == 1 else self.gather(value if self.is_first else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The values (plain data) of all ranks, by rank, on every rank; all wait for all."""
        if self.size == 1:
            return [value]
        self.join()
        self._count += 1
        keys = [f"gather/{self._count}/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self.rank], json.dumps(value))
            self._poll(lambda: bool(self._store.check(keys)))
            return [json.loads(self._store.get(key)) for key in keys]
        except RuntimeError as error:  # of torch: the host of the store is gone
            raise self._verdict().error(at=self.rank) from error

    def wait(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def host_by_host(self, action: Callable[[], T]) -> T:
        """Do what leaves something on the host: the first rank of every host, then the others."""
        if self.size == 1:
            return action()
        found: list[T] = []
        with self.failing_together():
            for is_turn in (self.place.local_rank == 0, self.place.local_rank != 0):
                if is_turn:
                    found.append(action())
                self.wait()
        return found[0]

    def total(self, tensor: "Tensor") -> "Tensor":
        """The sum of a tensor over all ranks, exact for integers; one collective.

        Args:
            tensor: of equal shape and dtype on all ranks; on the device of the rank.
        """
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        self.join()
        self._count += 1
        is_cuda = tensor.device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.PrefixStore(f"group/{self._count}", self._store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
        )
        try:
            work = dist.all_reduce(tensor, async_op=True)
            self._poll(work.is_completed)
            work.wait()
        except RuntimeError:
            # A rank that is gone breaks the collective; who it was is known in a moment.
            time.sleep(_VERDICT_SECONDS)
            raise
        finally:
            dist.destroy_process_group()
        return tensor

    def count_progress(self, progress: Callable[[int], None]) -> Callable[[int], None]:
        """A callback for the bytes of this rank; the first calls `progress` with those of all."""
        if self.size == 1:
            return progress
        if self.is_first:
            self._progress = progress
            return progress

        def count(done: int) -> None:
            if self._watch is not None:
                self._watch.done_bytes += done

        return count

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """A failure of this rank within ends the others too."""
        if self.size == 1:
            yield
            return
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error, so that they end too."""
        self.tell(Failure.of(error, self.rank, self._host))

    def tell(self, own: Failure) -> Failure:
        """Tell the others of a failure; returns the one that all end with: the first told.

        A rank that cannot reach the others ends with its own.
        """
        if not self.is_together:
            return own
        if self._ended is None:
            self._ended = own
            try:
                self.join()
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is known already
                first = Failure(**json.loads(self._store.compare_set("failure", "", own.text())))
            except (RuntimeError, ValueError, DriftMergeError):
                return own
            # What every rank meets by itself is nobody's in particular.
            is_same = (first.kind, first.message) == (own.kind, own.message)
            self._ended = replace(first, rank=NOBODY) if is_same else first
        return self._ended

    def failure(self, kind: str, message: str, remedy: str) -> Failure:
        """A failure of this rank."""
        return Failure(self.rank, self._host, kind, message, remedy)

    def wait_left(self) -> None:
        """After a failure: wait a while until no other rank writes any more."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        with suppress(RuntimeError):
            if self._store is not None:
                self._poll(lambda: all(map(self._has_left, others)), _LEAVE_SECONDS)

    def _has_left(self, rank: int) -> bool:
        is_lost = self._watch is not None and self._watch.lost == rank
        return is_lost or self._is_gone(rank) or bool(self._store.check([f"left/{rank}"]))

    def leave(self) -> None:
        """Nothing more will be done together; the first, which may serve the store, goes last."""
        if self._watch is not None:
            self._watch.stop()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if self.is_first:
                self.wait_left()

    def _terminated(self, *_: object) -> None:
        """Whatever ends this rank from outside: another's failure or loss, or torchrun."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise self._verdict().error(at=self.rank)

    def _verdict(self) -> Failure:
        """What has ended this rank: what was told, a rank that is lost, or somebody outside."""
        try:
            if self._store.check(["failure"]):
                self._ended = Failure(**json.loads(self._store.get("failure")))
            for rank in () if self._ended else range(self.size):
                if found := self._loss_of(rank):
                    return self.tell(found)
        except RuntimeError:
            how = "or its torchrun has ended: its store does not answer"
            self._ended = lost(0, "the first host", how, found_by=self.rank)
        return self._ended or self.tell(Failure(self.rank, self._host, INTERRUPTED, ""))

    def _loss_of(self, rank: int) -> Failure | None:
        """Whether a rank beats no more, or is of this host and its process gone."""
        if rank == self.rank or self._store.check([f"left/{rank}"]):
            return None
        if self._is_gone(rank):
            how = "ended without a word: it was killed, or crashed"
        elif self._watch is not None and self._watch.lost == rank:
            how = f"was not heard of for {watch.LOST_SECONDS:.0f} s"
        else:
            return None
        return lost(rank, "process {1} on {0}".format(*self._who[rank]), how, found_by=self.rank)

    def _is_gone(self, rank: int) -> bool:
        host, process = self._who[rank]
        return host == self._host and rank != self.rank and not _lives(process)


def _lives(process: int) -> bool:
    """Whether a process of this host still runs; one that has ended may wait for its parent."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:
        return False
    except OSError:
        return True  # not ours to ask, or a system without /proc
    return state.rpartition(")")[2].split()[:1] != ["Z"]


ALONE = Ranks(Place())

"""A thread of every rank that shows it lives, looks whether the others do, and counts their work.

What it finds reaches the main thread as SIGTERM, which torchrun sends too when a rank has ended:
one way in for all that ends a rank from outside, wherever it waits.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

BEAT_SECONDS = 0.25
LOST_SECONDS = 20.0  # without a beat; a rank that works beats from a thread of its own


class Watch:
    """The watch of one rank over others; start it once, stop it at the end."""

    def __init__(
        self,
        store: Any,
        rank: int,
        others: Iterable[int],
        progress: Callable[[int], None],
        is_gone: Callable[[int], bool],
    ) -> None:
        """See the class.

        Args:
            store: of torch.distributed; only calls that do not wait are made.
            rank: this one.
            others: the ranks to look at: all for the first, the first for all.
            progress: called with the bytes that the others have done since the last call.
            is_gone: whether the process of a rank is known to have ended.
        """
        self._store, self._rank, self._progress = store, rank, progress
        self._is_gone = is_gone
        self._seen = {other: (b"", time.monotonic()) for other in others}
        self._bytes = dict.fromkeys(self._seen, 0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.done_bytes = 0  # by this rank
        self.lost: int | None = None  # a rank that beats no more
        self.is_store_lost = False

    def start(self) -> None:
        """Begin."""
        self._beat(0)
        self._thread.start()

    def stop(self) -> None:
        """Say that this rank needs no watching any more, and end."""
        if not self._stopped.is_set():
            self._stopped.set()
            if self._thread.ident is not None and self._thread is not threading.current_thread():
                self._thread.join()
            try:
                self._store.set(f"left/{self._rank}", "1")
            except Exception:
                self.is_store_lost = True

    def _beat(self, count: int) -> None:
        self._store.set(f"beat/{self._rank}", f"{count}:{self.done_bytes}")

    def _watch(self) -> None:
        count = 0
        while not self._stopped.wait(BEAT_SECONDS):
            count += 1
            try:
                self._beat(count)
                failed = self._store.check(["failure"]) or self._look()
            except Exception:  # torch raises what it likes when the host of the store is gone
                self.is_store_lost = failed = True
            if failed:
                # To the main thread, so that what it waits for is interrupted.
                main = threading.main_thread().ident
                if main is not None and not self._stopped.is_set():
                    signal.pthread_kill(main, signal.SIGTERM)
                return

    def _look(self) -> bool:
        """Look at every other rank; whether one is lost."""
        now = time.monotonic()
        for other, (before, since) in list(self._seen.items()):
            if self._store.check([f"left/{other}"]):
                del self._seen[other]
                continue
            beat = self._store.get(f"beat/{other}") if self._store.check([f"beat/{other}"]) else b""
            if beat != before:
                self._seen[other] = (beat, now)
                done = int(beat.partition(b":")[2])
                self._progress(done - self._bytes[other])
                self._bytes[other] = done
            elif now - since > LOST_SECONDS or self._is_gone(other):
                self.lost = other
                return True
        return False

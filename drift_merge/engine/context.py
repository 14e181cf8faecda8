"""What the workers of a run share: inputs, device, downloads, the flag that stops them all."""

import threading
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from drift_merge.engine.downloads import Downloads
from drift_merge.engine.inputs import Inputs
from drift_merge.engine.workspace import Workspace
from drift_merge.storage.ranks.meeting import ALONE, Ranks

Progress = Callable[[int], None]  # called with the bytes written since the last call


class StopFlag(Protocol):
    """What tells workers to stop: a `threading.Event`, or the like of it between processes."""

    def set(self) -> None:
        """From now on `is_set`."""

    def is_set(self) -> bool:
        """Whether somebody has set it."""


class Stopped(Exception):
    """Another worker failed or the user interrupted; this one gives up its tensor."""


@dataclass(slots=True)
class WorkerContext:
    """What the workers of one run share."""

    inputs: Inputs
    device: torch.device
    progress: Progress
    downloads: Downloads = field(default_factory=Downloads)
    ranks: Ranks = ALONE  # the processes that share the work
    share: Collection[str] | None = None  # output tensors of this one; None: all
    stop: StopFlag = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    local: threading.local = field(default_factory=threading.local)

    def is_own(self, name: str) -> bool:
        """Whether an output tensor is this process's to look at and to make."""
        return self.share is None or name in self.share

    def workspace(self) -> Workspace:
        """This thread's buffers; made on its first tensor."""
        if not hasattr(self.local, "workspace"):
            torch.set_num_threads(1)  # intra-op threads on small chunks cost 4 to 6 times the CPU
            self.local.workspace = Workspace(self.device)
        workspace: Workspace = self.local.workspace
        return workspace

    def borrow(self, name: str, uses: int = 1) -> AbstractContextManager[None]:
        """Work on one tensor, once its shards are here; see `Downloads.borrow`."""
        return self.downloads.borrow(name, uses, self.check)

    def check(self) -> None:
        """Give up if another worker has failed.

        Raises:
            Stopped: it has.
        """
        if self.stop.is_set():
            raise Stopped

"""Several processes of one training: the first one reads, checks and writes for all."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from drift_merge.errors import DriftMergeError, OutputError

T = TypeVar("T")


def rank() -> int:
    """The number of this process, as torchrun and accelerate say it."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_does(work: Callable[[], T]) -> T:
    """What the first process makes of it, in every process; its error is everybody's.

    Raises:
        DriftMergeError: what the first process has raised.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except DriftMergeError as error:
            told[1] = error
        except BaseException as error:
            dist.broadcast_object_list([None, OutputError(f"the first process failed: {error}")])
            raise
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found


def wait_for_all() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()

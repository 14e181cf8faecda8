"""Several processes of one training: the first one reads, checks and writes for all."""

import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch.distributed as dist

from drift_merge.errors import DriftMergeError, OutputError, RecipeError

T = TypeVar("T")

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The same of Open MPI, of Intel MPI and MPICH, and of MVAPICH.
_OPEN_MPI = ("COMM_WORLD_RANK", "COMM_WORLD_SIZE", "COMM_WORLD_LOCAL_RANK", "COMM_WORLD_LOCAL_SIZE")
_MPI = (
    tuple(f"OMPI_{name}" for name in _OPEN_MPI),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    tuple(f"MV2_{name}" for name in _OPEN_MPI),
)


def adopt_mpi(environment: MutableMapping[str, str] = os.environ) -> None:
    """Name the place that mpirun has given this process as torchrun would.

    accelerate reads both on a CPU (its `launch` starts mpirun there), so without this every process
    would take itself for the only one until it trains, and all would write the same output.

    Raises:
        RecipeError: a number of processes is none.
    """
    if "WORLD_SIZE" in environment:
        return
    for names in _MPI:
        if _number(names[1], 1, environment) > 1:
            pairs = zip(_NAMES, names, strict=True)
            environment.update(
                {ours: environment[own] for ours, own in pairs if own in environment}
            )
            return


def rank() -> int:
    """The number of this process, as torchrun and accelerate say it."""
    return _number("RANK", 0)


def num_processes() -> int:
    """How many processes train together."""
    return _number("WORLD_SIZE", 1, least=1)


def local_processes() -> int:
    """How many processes share this machine's memory."""
    return _number("LOCAL_WORLD_SIZE", num_processes(), least=1)


def _number(
    name: str, missing: int, environment: Mapping[str, str] = os.environ, *, least: int = 0
) -> int:
    found = environment.get(name, str(missing))
    if found.isascii() and found.isdigit() and int(found) >= least:
        return int(found)
    raise RecipeError(
        f"the variable {name} is {found!r}, where the launcher of several processes writes a "
        f"whole number from {least}.",
        remedy=f"Start the training with torchrun or accelerate, or alone: env -u {name} ...",
    )


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

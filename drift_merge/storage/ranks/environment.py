"""Which of torchrun's processes this one is, from the environment; see torchrun's manual.

Only torchrun's own variables count: RANK and WORLD_SIZE alone are set by schedulers too, around
commands that are meant to run by themselves.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from drift_merge.errors import RecipeError
from drift_merge.storage.processes import num_cores

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Place:
    """The place of this process among those of a command."""

    rank: int = 0
    size: int = 1  # of the job: number of ranks
    local_rank: int = 0  # on this host
    local_size: int = 1


def place_in(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that torchrun gave this process; alone without torchrun.

    Raises:
        RecipeError: the variables contradict each other.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return Place()
    try:
        place = Place(*(int(environment[name]) for name in _NAMES))
    except (KeyError, ValueError):
        place = Place(-1)
    if 0 <= place.rank < place.size and 0 <= place.local_rank < place.local_size <= place.size:
        return place
    found = ", ".join(f"{name}={environment.get(name, '')}" for name in _NAMES)
    raise RecipeError(
        f"the variables of torchrun contradict each other: {found}.",
        remedy="Start the command with torchrun, or without it: env -u TORCHELASTIC_RUN_ID ...",
    )


def own_device(device: str, place: Place) -> str:
    """The device of one rank: "cuda" is the GPU with the number of the rank on its host."""
    return f"cuda:{place.local_rank}" if device == "cuda" and place.size > 1 else device


def own_cores() -> int:
    """Cores for this process: those of the host, or of the container, shared by its ranks."""
    return max(1, num_cores() // place_in().local_size)

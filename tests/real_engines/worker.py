"""One process of a scenario: join the group, run, save what it returns. See `launch`."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tests.real_engines.scenarios import SCENARIOS

PATIENCE = timedelta(seconds=120)  # for a collective: less than the launcher's


def main() -> None:
    spec = json.loads(sys.argv[1])
    directory = Path(spec["directory"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )
    found = scenario_named(spec["scenario"])(directory, **spec["settings"])
    torch.save(found, directory / f"{rank}.pt")
    torch.distributed.barrier()


def scenario_named(name: str) -> Callable[..., Any]:
    """One of the engines' scenarios, or a function by its dotted name."""
    module, dot, function = name.rpartition(".")
    found: Callable[..., Any] = getattr(import_module(module), function) if dot else SCENARIOS[name]
    return found


def leave(code: int) -> None:
    """Without destroy_process_group(): engines leave threads that may wait for it forever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(0)

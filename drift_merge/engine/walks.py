"""Walks over the inputs of all steps before any tensor is made, for methods that need one."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from drift_merge.engine.plan import Plan, Step
from drift_merge.engine.reader import Run

T = TypeVar("T")


def walk_steps(
    run: Run, plan: Plan, steps: Sequence[Step], look: Callable[[Step], T], *, threads: int
) -> Iterator[tuple[Step, T]]:
    """Look at the inputs of every step, on a pool of threads.

    Args:
        run: of the stream.
        plan: whose steps they are.
        steps: all that the method computes.
        look: what to find of one step; called in inference mode.
        threads: workers.

    Returns:
        Steps and what was found, in the order of the work: it depends on where the inputs are.
    """
    by_name = {step.name: step for step in steps}

    def held(name: str) -> tuple[Step, T]:
        with (
            run.hold(name),
            torch.inference_mode(),
            run.workspace().on_stream(),
        ):
            return by_name[name], look(by_name[name])

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(held, run.feed.begin(by_name, plan))
        except BaseException:
            run.stop.set()  # those that wait for shards must not wait on
            raise

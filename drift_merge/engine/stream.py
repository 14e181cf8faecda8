"""The executor: every step of a plan, on a small pool of threads, journaled on the way.

Knows steps, not formulas. Every result depends on the plan and the inputs alone: not on
threads, their order or an interruption.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from drift_merge.engine.extents import Extents
from drift_merge.engine.inputs import Inputs
from drift_merge.engine.plan import Plan, Step
from drift_merge.engine.steps import Progress, Run, Stopped, run_step
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.journal import Results
from drift_merge.storage.output import OutputDirectory
from drift_merge.storage.shards import ShardWriter

_Message = tuple[str, dict[str, Any]] | BaseException | None  # of a worker; None: it has ended


class _Discard:
    """A sink for recomputation: only the fingerprints matter."""

    def write(self, info: TensorInfo, begin: int, data: Any) -> None:
        pass


def stream(
    plan: Plan,
    output: OutputDirectory,
    *,
    threads: int,
    device: str = "cpu",
    progress: Progress = lambda _: None,
) -> Results:
    """Execute a plan into the payload of an output, resuming where its journal ends.

    Args:
        plan: what to do.
        output: entered; its `finished` tensors are not done again.
        threads: workers, at least 1.
        device: "cpu", "cuda" or "cuda:n"; where the arithmetic happens.
        progress: called from the workers with bytes written.

    Returns:
        For each output tensor what was measured of it, in the order of the plan. All data is
        on the disk.

    Raises:
        CheckpointError: an input changed, or holds NaN or Inf (unless the recipe allows it).
        OutputError: the disk is full or fails. What was finished stays journaled.
    """
    results: Results = {name: dict(done) for name, done in output.finished.items()}
    todo = [step for step in plan.steps if step.name not in results]
    with (
        Inputs(plan.sources) as inputs,
        ShardWriter(plan.layout, output.payload) as writer,
        _one_torch_thread(),
    ):
        for name in results:
            progress(plan.layout.tensors[name].size_bytes)
        run = Run(plan, inputs, writer, torch.device(device), progress)
        for name, result in _finished(run, todo, writer, output, threads):
            results[name] = result
    return {step.name: results[step.name] for step in plan.steps}


def recompute(plan: Plan, steps: list[Step], *, device: str = "cpu") -> Results:
    """Compute some steps of a plan again, writing nothing; the results hold the fingerprints."""
    with Inputs(plan.sources) as inputs, _one_torch_thread():
        run = Run(plan, inputs, _Discard(), torch.device(device), lambda _: None)
        return dict(run_step(run, step) for step in steps)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finished(
    run: Run, todo: list[Step], writer: ShardWriter, output: OutputDirectory, threads: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the steps on a pool of threads; yield each result; journal extents on the way."""
    queue: SimpleQueue[_Message] = SimpleQueue()
    steps = iter(todo)
    workers = [Thread(target=_work, args=(run, steps, queue)) for _ in range(threads)]
    with Extents(writer, output, run.plan) as extents:
        try:
            for worker in workers:
                worker.start()
            for _ in workers:
                while (message := queue.get()) is not None:
                    if isinstance(message, BaseException):
                        raise message
                    extents.add(*message)
                    yield message
        finally:
            # After Ctrl-C or a failure too: what is finished is flushed and journaled.
            run.stop.set()
            for worker in workers:
                worker.join()
            while not queue.empty():
                message = queue.get()
                if isinstance(message, tuple):
                    extents.add(*message)


def _work(run: Run, steps: Iterator[Step], queue: "SimpleQueue[_Message]") -> None:
    """One worker: take the next step until there is none; None says goodbye."""
    try:
        while not run.stop.is_set():
            with run.lock:
                step = next(steps, None)
            if step is None:
                break
            queue.put(run_step(run, step))
    except Stopped:
        pass
    except BaseException as error:
        run.stop.set()
        queue.put(error)
    queue.put(None)

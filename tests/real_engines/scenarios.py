"""What one process of a scenario does: train the toy under an engine, for several cases.

Results are plain data and whole tensors, so that the test compares them with training by hand.
"""

import gc
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

import drift_merge
from drift_merge.errors import DriftMergeError
from drift_merge.names.tensors import matrix_shape
from drift_merge.training.deltas.files import FileDeltas
from tests.real_engines import toy
from tests.real_engines.engines import ENGINES, Trainer, whole


@contextmanager
def counted_reductions() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what drift_merge reduces, in order."""
    calls: list[tuple[int, ...]] = []
    original = torch.distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"].startswith("drift_merge."):
            calls.append(tuple(tensor.shape))
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    try:
        yield calls
    finally:
        torch.distributed.all_reduce = original


@contextmanager
def recorded_reads() -> Iterator[dict[str, Tensor]]:
    """How often each element of each delta is read by this rank, as matrices."""
    reads: dict[str, Tensor] = {}
    original = FileDeltas.chunk

    def chunk(self: FileDeltas, unit: Any, begin: int, block: Any, out: Tensor) -> None:
        found = reads.setdefault(
            unit.name, torch.zeros(matrix_shape(unit.shape), dtype=torch.int32)
        )
        found[block.row : block.row + block.rows, block.col : block.col + block.cols] += 1
        original(self, unit, begin, block, out)

    FileDeltas.chunk = chunk  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        FileDeltas.chunk = original  # type: ignore[method-assign]


def train(trainer: Trainer, steps: range, after: Callable[[], None] = lambda: None) -> None:
    rank, world = trainer.data_ranks
    for step in steps:
        trainer.step(toy.batches(step, world)[rank])
        after()


def attached(trainer: Trainer, source: str, **changes: Any) -> Any:
    options = {"alpha": toy.ALPHA, "optimizer": trainer.optimizer} | changes
    return drift_merge.attach(trainer.model, Path(source) / "prior", **options)


def rules(
    directory: Path,
    *,
    source: str,
    engine: str,
    steps: int = toy.STEPS,
    only: tuple[str, ...] = toy.RULES,
    **settings: Any,
) -> dict[str, Any]:
    """Every rule, and none: weights, reductions by step, elements read."""
    results: dict[str, Any] = {}
    trainer = ENGINES[engine](Path(source), **settings)
    train(trainer, range(steps))
    results["None"] = {"weights": trainer.weights(), "data": trainer.data_ranks[1]}
    for rule in only:
        trainer = ENGINES[engine](Path(source), **settings)
        ends: list[int] = []
        with counted_reductions() as calls, recorded_reads() as reads:
            handle = attached(trainer, source, rule=rule)
            train(trainer, range(steps), lambda: ends.append(len(calls)))  # noqa: B023
        begins = [0, *ends[:-1]]
        results[rule] = {
            "weights": trainer.weights(),
            "data": trainer.data_ranks[1],
            "reductions": [calls[a:b] for a, b in zip(begins, ends, strict=True)],
            "reads": reads,
            "handle_steps": handle.steps,
        }
        handle.remove()
    return results


def report(directory: Path, *, source: str, engine: str, **settings: Any) -> dict[str, Any]:
    """What the handle says after every step, on this rank."""
    trainer = ENGINES[engine](Path(source), **settings)
    handle = attached(trainer, source)
    reports: list[dict[str, Any]] = []
    train(trainer, range(toy.STEPS), lambda: reports.append(handle.report() | handle.metrics()))
    return {"reports": reports}


def resume(
    directory: Path, *, source: str, engine: str, rule: str, **settings: Any
) -> dict[str, Any]:
    """A run with a schedule, whole and in two parts joined by a saved state."""
    options: dict[str, Any] = {"rule": rule, "schedule": "linear", "total_steps": toy.STEPS + 1}
    whole = ENGINES[engine](Path(source), **settings)
    handle = attached(whole, source, **options)
    train(whole, range(toy.STEPS))
    results = {"whole": whole.weights(), "whole_report": handle.report()}
    handle.remove()
    parts = ENGINES[engine](Path(source), **settings)
    handle = attached(parts, source, **options)
    train(parts, range(1))
    state = json.loads(json.dumps(handle.state_dict()))
    handle.remove()
    handle = attached(parts, source, state=state, **options)
    train(parts, range(1, toy.STEPS))
    return results | {"parts": parts.weights(), "parts_report": handle.report(), "state": state}


def remove(directory: Path, *, source: str, engine: str, **settings: Any) -> dict[str, Any]:
    """A run whose handle is removed before the first step, and one that never had any."""
    results = {}
    for name in ("plain", "removed"):
        trainer = ENGINES[engine](Path(source), **settings)
        if name == "removed":
            attached(trainer, source).remove()
        train(trainer, range(toy.STEPS))
        results[name] = trainer.weights()
    return results


def changed_weights(
    directory: Path, *, source: str, engine: str, **settings: Any
) -> dict[str, Any]:
    """One element of a weight is another one before the engine gets the model."""
    trainer = ENGINES[engine](Path(source), change=toy.CHANGED, **settings)
    try:
        attached(trainer, source)
        train(trainer, range(1))
    except DriftMergeError as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {"error": None}


def overflow(directory: Path, *, source: str, stage: int) -> dict[str, Any]:
    """fp16 with a loss scale that is far too large at first: DeepSpeed skips until it fits."""
    trainer = ENGINES["deepspeed"](
        Path(source), stage=stage, dtype="fp16", loss_scale=0, first_scale_power=18
    )
    handle = attached(trainer, source, rule="absolute", schedule="linear", total_steps=8)
    train(trainer, range(8))
    engine = trainer.model
    return {
        "steps": handle.steps,
        "skipped": engine.skipped_steps,
        "taken": engine.global_steps - engine.skipped_steps,
        "is_finite": all(bool(w.isfinite().all()) for w in trainer.weights().values()),
    }


def apply_by_hand(directory: Path, *, source: str) -> dict[str, Any]:
    """FSDP2 without a hook: handle.apply() before the step."""
    trainer = ENGINES["fsdp"](Path(source))
    optimizer = trainer.optimizer
    handle = attached(trainer, source, optimizer=None)
    rank, world = trainer.data_ranks
    for step in range(toy.STEPS):
        for micro in toy.batches(step, world)[rank]:
            (trainer.model(micro) / toy.ACCUMULATION).backward()
        handle.apply()
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": trainer.weights()}


def partial_gradient(directory: Path, *, source: str) -> dict[str, Any]:
    """A repeated DTensor whose gradient is still a sum over ranks, as sequence parallelism has."""
    model = toy.load(Path(source))
    mesh = init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    mlp = model.model.language_model.layers[0].mlp
    mlp.up_proj.weight = nn.Parameter(
        DTensor.from_local(mlp.up_proj.weight.detach(), mesh, [Replicate()])
    )
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            share = torch.full(parameter.shape, (rank + 1.0) / 3)
            parameter.grad = DTensor.from_local(share, mesh, [Partial()])
        else:
            parameter.grad = torch.ones_like(parameter)
    handle = attached(Trainer(model, None, lambda t: None, dict, (0, 1)), source, rule="gradnorm")
    handle.apply()
    return {"gradients": {name: whole(p.grad) for name, p in model.named_parameters()}}


def refusals(directory: Path, *, source: str) -> dict[str, Any]:
    """What goes wrong, and what is said of it."""
    return {name: _message(lambda act=act: act(Path(source))) for name, act in WRONG.items()}


def _message(act: Callable[[], object]) -> str | None:
    try:
        act()
    except DriftMergeError as error:
        return str(error)
    return None


def _shard_after(source: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = toy.load(source)
    handle = drift_merge.attach(model, source / "prior")
    fully_shard(model)
    model(toy.batches(0, 2)[0, 0]).backward()
    handle.apply()


def _shard_a_layer_after(source: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = toy.load(source)
    handle = drift_merge.attach(model, source / "prior")
    fully_shard(model.model.language_model.layers[1])
    model(toy.batches(0, 2)[0, 0]).backward()
    handle.apply()


def _gather_before(source: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(toy.load(source))
    model(toy.batches(0, 2)[0, 0])
    drift_merge.attach(model, source / "prior")


def _microbatch(source: Path) -> None:
    trainer = ENGINES["fsdp"](source)
    attached(trainer, str(source), when="microbatch")


def _deepspeed_after(stage: int) -> Callable[[Path], None]:
    def act(source: Path) -> None:
        handles: list[Any] = []

        def attach_early(model: toy.Toy) -> None:
            handles.append(drift_merge.attach(model, source / "prior"))

        trainer = ENGINES["deepspeed"](source, stage=stage, before=attach_early)
        engine = trainer.model
        for micro in toy.batches(0, 2)[0]:
            engine.backward(engine(micro))
        handles[0].apply()

    return act


def _muon(source: Path) -> None:
    trainer = ENGINES["deepspeed"](source, stage=2, named_optimizer="Muon")
    attached(trainer, str(source))


def _other_optimizer(source: Path) -> None:
    trainer = ENGINES["fsdp"](source)
    other = torch.optim.SGD(toy.load(source).parameters(), lr=0.1)
    attached(trainer, str(source), optimizer=other)


def memory(directory: Path, *, source: str, engine: str, **settings: Any) -> dict[str, Any]:
    """Anonymous memory that attach() and the first step add, at its highest."""
    trainer = ENGINES[engine](Path(source), **settings)
    if engine == "deepspeed":  # gradients come from a backward pass alone
        micro_batches = toy.batches(0, 2)[trainer.data_ranks[0]]
        for micro in micro_batches[:-1]:
            trainer.model.backward(trainer.model(micro))
            trainer.model.step()
        trainer.model.backward(trainer.model(micro_batches[-1]))
    else:
        for parameter in trainer.model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
    gc.collect()
    before = anonymous_bytes()
    with highest_anonymous() as seen:
        handle = attached(trainer, source, optimizer=None)
        handle.apply()
    return {"added": max(seen) - before, "elements": handle.coverage.elements}


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def highest_anonymous() -> Iterator[list[int]]:
    """Look every millisecond."""
    seen: list[int] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.001):
            seen.append(anonymous_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
        seen.append(anonymous_bytes())


WRONG: dict[str, Callable[[Path], None]] = {
    "fully_shard after attach": _shard_after,
    "fully_shard of a layer after attach": _shard_a_layer_after,
    "attach while gathered": _gather_before,
    "microbatch under FSDP2": _microbatch,
    "ZeRO-2 after attach": _deepspeed_after(2),
    "ZeRO-3 after attach": _deepspeed_after(3),
    "the optimizer of another model": _other_optimizer,
    "Muon under ZeRO-2": _muon,
}

SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {
    "rules": rules,
    "report": report,
    "resume": resume,
    "remove": remove,
    "changed_weights": changed_weights,
    "overflow": overflow,
    "apply_by_hand": apply_by_hand,
    "partial_gradient": partial_gradient,
    "refusals": refusals,
    "memory": memory,
}

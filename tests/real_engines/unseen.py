"""Scenarios of what happens without a word: late copies of offloaded gradients, late weights."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.real_engines import toy
from tests.real_engines.engines import ENGINES
from tests.real_engines.scenarios import attached, train


@contextmanager
def late_copies() -> Iterator[None]:
    """Offloaded gradients arrive where DeepSpeed waits for them, as they may on a GPU."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    accelerator, pending = get_accelerator(), []
    own_copy = Zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu
    own_wait, synchronize = Zero._wait_for_offload_copies, accelerator.synchronize

    def arrive() -> None:
        for place, values in pending:
            place.copy_(values)
        pending.clear()

    def send(self: Any, parameter: Any) -> None:
        group, _, begin, size = self.grad_position[self.get_param_id(parameter)]
        place = self.single_partition_of_fp32_groups[group].grad.view(-1).narrow(0, begin, size)
        before = place.clone()
        own_copy(self, parameter)
        pending.append((place, place.clone()))
        place.copy_(before)

    def wait(self: Any) -> None:
        arrive()
        own_wait(self)

    def wait_for_all(*_: Any) -> None:
        arrive()
        synchronize()

    Zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu = send
    Zero._wait_for_offload_copies, accelerator.synchronize = wait, wait_for_all
    try:
        yield
    finally:
        Zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu = own_copy
        Zero._wait_for_offload_copies, accelerator.synchronize = own_wait, synchronize


def offload(directory: Path, *, source: str) -> dict[str, Any]:
    """ZeRO-2 with CPU offload, plain and with the prior; copies at once and late."""
    settings = {"stage": 2, "is_offloaded": True}
    # With more, DeepSpeed waits before it accumulates the next parameter. (This process is ours.)
    toy.ACCUMULATION = 1

    def run(*, is_biased: bool) -> toy.Weights:
        trainer = ENGINES["deepspeed"](Path(source), **settings)
        handle = attached(trainer, source) if is_biased else None
        train(trainer, range(toy.STEPS))
        if handle is not None:
            handle.remove()
        return trainer.weights()

    found = {"plain": run(is_biased=False), "biased": run(is_biased=True)}
    with late_copies():
        found |= {"plain late": run(is_biased=False), "biased late": run(is_biased=True)}
    return found


def initialized_states(directory: Path, *, source: str) -> dict[str, Any]:
    """FSDP2: states that distributed checkpoints initialize are no steps, in both orders."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def make() -> Any:
        trainer = ENGINES["fsdp"](Path(source))
        options = {"lr": toy.LEARNING_RATE}
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, **options)
        return trainer, optimizer

    def steps(trainer: Any, optimizer: Any, numbers: range) -> None:
        rank, world = trainer.data_ranks
        for number in numbers:
            for micro in toy.batches(number, world)[rank]:
                (trainer.model(micro) / toy.ACCUMULATION).backward()
            optimizer.step()
            optimizer.zero_grad()

    options = StateDictOptions(strict=False)
    whole, optimizer = make()
    handle = attached(whole, source, optimizer=optimizer, rule="absolute")
    first = get_optimizer_state_dict(whole.model, optimizer, options=options)
    moments = [values["exp_avg"] for values in first["state"].values()]
    is_zero = not any(bool(m.to_local().any()) for m in moments)
    counted = handle.steps
    steps(whole, optimizer, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(whole.model, optimizer, options=options))
    weights = copy.deepcopy(whole.model.state_dict())
    state = json.loads(json.dumps(handle.state_dict()))
    steps(whole, optimizer, range(2, 4))
    results = {"is_zero": is_zero, "counted": counted, "whole": whole.weights()}
    for is_first in (True, False):
        again, fresh = make()
        again.model.load_state_dict(weights)
        if not is_first:
            set_optimizer_state_dict(again.model, fresh, copy.deepcopy(saved), options=options)
        resumed = attached(again, source, optimizer=fresh, rule="absolute", state=state)
        if is_first:
            set_optimizer_state_dict(again.model, fresh, copy.deepcopy(saved), options=options)
        steps(again, fresh, range(2, 4))
        results[f"attached {'first' if is_first else 'last'}"] = again.weights()
        results[f"steps {'first' if is_first else 'last'}"] = resumed.steps
    return results


def weights_not_loaded(directory: Path, *, source: str, engine: str, **settings: Any) -> Any:
    """A resumed run whose sharded weights are those of the beginning."""
    from drift_merge.errors import DriftMergeError

    trainer = ENGINES[engine](Path(source), **settings)
    handle = attached(trainer, source)
    train(trainer, range(1))
    state = json.loads(json.dumps(handle.state_dict()))
    handle.remove()
    handle = attached(trainer, source, state=state)
    train(trainer, range(1, 2))  # loaded: nothing to complain of
    handle.remove()
    fresh = ENGINES[engine](Path(source), **settings)
    attached(fresh, source, state=state)
    try:
        train(fresh, range(1, 2))
    except DriftMergeError as error:
        return {"error": str(error)}
    return {"error": None}

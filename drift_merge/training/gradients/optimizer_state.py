"""What an optimizer will still allocate: two float32 moments of what this rank trains.

At the first step most optimizers have no state yet. Counted are the elements that lie on this rank
and are trained: a shard under FSDP2, the factors under LoRA; nothing where state exists already,
as in a run that was resumed, or under DeepSpeed, which makes it at the beginning.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.training.gradients.hooks import parameters_of
from drift_merge.training.gradients.sharded import is_dtensor

_BYTES = 8  # an element: the moments of Adam. 8-bit optimizers take less, SGD nothing


def pending_state_bytes(
    steppers: Iterable[Any], trained: Mapping[str, nn.Parameter], device: torch.device
) -> int:
    """Bytes that the first step will allocate on a device.

    Args:
        steppers: the optimizers that step the model; of none of them the state is not known, and
            that of the biased parameters is counted.
        trained: the parameters that are biased, by name.
        device: whose memory is asked about.
    """
    steppers = list(steppers)
    waiting = list(trained.values())
    if steppers:
        plain = [one for one in steppers if isinstance(one, torch.optim.Optimizer)]
        waiting = [p for one in plain for p in parameters_of(one) if p not in one.state]
    held = {id(p): _local(p) for p in waiting if p.requires_grad}
    return sum(_BYTES * one.numel() for one in held.values() if one.device == device)


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local() if is_dtensor(parameter) else parameter
    return local.detach()

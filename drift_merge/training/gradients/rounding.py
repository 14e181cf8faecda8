"""Do steps of the optimizer survive the rounding of 16-bit parameters?

A weight w in bfloat16 changes only where a step is larger than half the distance to its
neighbor, 2**-9 |w| to 2**-8 |w|. A step of Adam is about the learning rate, whatever the gradient.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drift_merge.training.gradients.sharded import is_dtensor

_SAMPLE = 4096  # weights of each parameter
_ENOUGH = 0.5  # fraction of the weights that a step must be able to change
LIKE_ADAM = ("adam", "lion", "adopt")  # by the name of the class: a step is about lr
_CAREFUL = ("bf16_stochastic_round", "stochastic_rounding", "kahan_sum", "use_kahan_summation")


def warn_of_rounding(*steppers: Any, trained: Mapping[str, nn.Parameter]) -> None:
    """Warn where most weights are rounded back at every step.

    Args:
        steppers: optimizers that step the parameters themselves. DeepSpeed's, which keep float32
            masters, and those whose steps are not about lr are not looked at.
        trained: the parameters that are biased, by name.
    """
    ours = {id(parameter) for parameter in trained.values()}
    groups = [
        (group, [p for p in group["params"] if id(p) in ours and p.dtype.itemsize == 2])
        for stepper in steppers
        if isinstance(stepper, torch.optim.Optimizer) and _rounds(stepper)
        for group in stepper.param_groups
    ]
    rates = [_rate(group) for group, held in groups if held]
    if not rates or None in rates:
        return
    changed = whole = 0.0
    for group, held in groups:
        for parameter in held:
            fraction = changeable(_values(parameter), _rate(group) or 0.0)
            changed += fraction * parameter.numel()
            whole += parameter.numel()
    if whole and changed / whole < _ENOUGH:
        dtype = str(next(p for _, held in groups for p in held).dtype).removeprefix("torch.")
        warnings.warn(
            f"the weights are {dtype} and the optimizer steps them as they are: at learning rate"
            f" {max(rate or 0.0 for rate in rates):g} a step is larger than half the distance to"
            f" the next {dtype} for {changed / whole:.1%} of the weights alone; the others round"
            " back, and neither data nor prior moves them.\nKeep float32 weights:"
            " from_pretrained(..., dtype=torch.float32), with bf16=True or autocast for speed; or"
            " use float32 masters (DeepSpeed) or stochastic rounding.",
            stacklevel=4,
        )


def changeable(weights: Tensor, step: float) -> float:
    """The fraction of some weights that a step of this size changes, after rounding to nearest.

    Args:
        weights: any shape, 16-bit floating point.
        step: its size, > 0.

    >>> changeable(torch.tensor([1.0, 1e-4], dtype=torch.bfloat16), 1e-5)
    0.5
    """
    info = torch.finfo(weights.dtype)
    _, exponent = torch.frexp(weights.float().abs().clamp(min=info.smallest_normal))
    # |w| = m 2**e with m in [0.5, 1): neighbors are eps 2**(e-1) apart.
    half = torch.exp2(exponent.float()) * (info.eps / 4)
    return float((half < step).float().mean()) if weights.numel() else 1.0


def _rounds(optimizer: torch.optim.Optimizer) -> bool:
    name = type(optimizer).__name__.lower()
    flags = [vars(optimizer), optimizer.defaults, *optimizer.param_groups]
    is_careful = any(values.get(flag) for values in flags for flag in _CAREFUL)
    return any(word in name for word in LIKE_ADAM) and not is_careful


def _rate(group: Mapping[str, Any]) -> float | None:
    """The highest learning rate: a scheduler has set that of the first step, often 0."""
    rate = group.get("initial_lr", group.get("lr"))
    return None if rate is None or float(rate) == 0.0 else float(rate)


def _values(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local() if is_dtensor(parameter) else parameter
    flat = local.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]

"""Gradients under DeepSpeed: ZeRO-0, 1, 2 and 3, fp32, bf16 and fp16, with CPU offload or not.

The bias goes in where the engine takes an optimizer step, that is at the boundary of gradient
accumulation, after reduction and **before** unscaling and clipping: the norm that DeepSpeed logs
is that of the biased gradient, and `gradient_clipping` bounds it. Mind that since 0.19 it is 1.0
unless the config says 0. (ZeRO-0 in fp32 steps torch's own optimizer, after clipping.) fp16
gradients still carry the loss scale; a step that overflows is skipped by DeepSpeed as ever.

ZeRO-1 and 2 give a rank a flat piece of all parameters of a group laid end to end (see
`zero_partitions`), ZeRO-3 a flat piece of every parameter; the rank reads that range of delta
and no more. BF16_Optimizer (ZeRO-1 in bf16 with fp32 accumulation) keeps whole fp32 gradients on
every rank and takes its norm of them there, so every rank biases all of them.

DeepSpeed is not imported: its optimizers are known by their class and attributes (0.19.8).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drift_merge.errors import RecipeError
from drift_merge.training.gradients.layout import GradientLayout, PlainLayout
from drift_merge.training.gradients.zero_partitions import (
    PartitionedLayout,
    loss_scale_of,
    region_within,
    several,
)
from drift_merge.training.units import Region, Unit


class WholeLayout:
    """Whole gradients on every rank: ZeRO-0 in bf16 and fp16, BF16_Optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @property
    def loss_scale(self) -> float | Tensor | None:
        """What the gradients are still multiplied with; None for 1."""
        return loss_scale_of(self._optimizer)

    def wait(self) -> None:
        """Nothing to wait for."""

    def region(self, unit: Unit) -> Region | None:
        """All of the unit."""
        return Region(flat=(0, unit.numel))

    def gradient(self, unit: Unit) -> Tensor | None:
        """The gradient, flat, as a view: BF16_Optimizer's fp32 one where there is one."""
        parameter = _parameter(unit)
        gradient = getattr(parameter, "_hp_grad", None)
        gradient = parameter.grad if gradient is None else gradient
        return None if gradient is None else gradient.view(-1).narrow(0, unit.begin, unit.numel)

    def put(self, unit: Unit, gradient: Tensor) -> None:
        """Nothing to do: `gradient` is a view."""

    def values(self, unit: Unit) -> Tensor | None:
        """The values of the parameter, flat."""
        values: Tensor = _parameter(unit).detach().view(-1)
        return values.narrow(0, unit.begin, unit.numel)

    def group(self, unit: Unit) -> ProcessGroup | None:
        """None: every rank has all of it."""
        return None


class Stage3Layout:
    """ZeRO-3: rank k holds elements [k * n, (k + 1) * n) of every parameter."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._is_offloaded = bool(getattr(optimizer, "offload_optimizer", False))

    @property
    def loss_scale(self) -> float | Tensor | None:
        """What the gradients are still multiplied with; None for 1."""
        return loss_scale_of(self._optimizer)

    def wait(self) -> None:
        """Nothing to wait for: DeepSpeed synchronizes where it hands out a gradient."""

    def region(self, unit: Unit) -> Region | None:
        """The part of the unit in this rank's piece of its parameter, or None."""
        start, size = self._start(unit), _parameter(unit).partition_numel()
        return region_within(
            unit, start, start + size
        )  # beyond the parameter there is only padding

    def gradient(self, unit: Unit) -> Tensor | None:
        """The gradient of the region in fp32: a view where DeepSpeed keeps it so, or a copy."""
        return self._cut(unit, self._optimizer.get_local_fp32_grad_for_param(_parameter(unit)))

    def put(self, unit: Unit, gradient: Tensor) -> None:
        """Store a gradient that is a copy; with offload, let DeepSpeed take its norm again."""
        parameter = _parameter(unit)
        piece = self._optimizer.get_local_fp32_grad_for_param(parameter)
        stored = self._cut(unit, piece)
        if stored is None:
            return
        is_view = stored.data_ptr() == gradient.data_ptr()
        if not is_view:
            stored.copy_(gradient)
        if self._is_offloaded or not is_view:
            self._optimizer.set_local_grad_for_param(piece, parameter)

    def values(self, unit: Unit) -> Tensor | None:
        """The fp32 master values of the region; a frozen parameter's own (LoRA's base)."""
        parameter = _parameter(unit)
        values = self._optimizer.get_local_fp32_param(parameter)
        return self._cut(unit, (parameter.ds_tensor if values is None else values).detach())

    def group(self, unit: Unit) -> ProcessGroup | None:
        """The ranks that share the parameter, this one included whatever it holds."""
        return several(_parameter(unit).ds_process_group)

    def _start(self, unit: Unit) -> int:
        parameter = _parameter(unit)
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        return rank * int(parameter.partition_numel())

    def _cut(self, unit: Unit, piece: Tensor) -> Tensor | None:
        region = self.region(unit)
        if region is None or region.flat is None:
            return None
        begin, end = region.flat
        return piece.view(-1).narrow(0, unit.begin + begin - self._start(unit), end - begin)


LAYOUTS: dict[str, Callable[[Any], GradientLayout]] = {
    "FP16_Optimizer": WholeLayout,
    "FP16_UnfusedOptimizer": WholeLayout,
    "BF16_Optimizer": WholeLayout,
    "DeepSpeedZeroOptimizer": PartitionedLayout,
    "DeepSpeedZeroOptimizer_Stage3": Stage3Layout,
}


def is_deepspeed(thing: Any) -> bool:
    """Whether an object is DeepSpeed's: an engine, its optimizer, or a model under ZeRO."""
    if isinstance(thing, torch.optim.Optimizer):  # also those that DeepSpeed ships
        return False
    if any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(thing).__mro__):
        return True
    parameters = thing.parameters() if isinstance(thing, nn.Module) else ()
    return any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in parameters)


def find_optimizer(model: nn.Module, optimizer: Any = None) -> Any:
    """The optimizer that the engine steps: one of DeepSpeed's, or torch's own (ZeRO-0 in fp32).

    Args:
        model: the engine, or the module in it.
        optimizer: the engine, its optimizer, or None.

    Raises:
        RecipeError: there is none to be found.
    """
    for thing in (optimizer, model):
        if isinstance(thing, nn.Module) and hasattr(thing, "was_step_applied"):  # the engine
            return thing.optimizer
    if optimizer is not None:
        return optimizer
    for parameter in model.parameters():
        for link in ("_z3_optimizer", "_zero_optimizer"):
            if hasattr(parameter, link):
                return getattr(parameter, link)
    raise RecipeError(
        "the model is DeepSpeed's, but its optimizer cannot be found from it.",
        remedy="Pass the engine: attach(engine, prior, optimizer=engine)",
    )


def deepspeed_layout(model: nn.Module, optimizer: Any = None) -> GradientLayout:
    """The layout of the gradients of a model under DeepSpeed.

    Args:
        model: the engine, or the module in it.
        optimizer: the engine, its optimizer, or None.

    Raises:
        RecipeError: an optimizer whose gradients at the step are unknown, or no gradients.
    """
    found = find_optimizer(model, optimizer)
    if isinstance(found, torch.optim.Optimizer):
        return PlainLayout()
    name = type(found).__name__
    inner = type(getattr(found, "optimizer", None)).__name__
    if name not in LAYOUTS or "muon" in inner.lower():
        raise RecipeError(
            f"gradients under DeepSpeed's {name} ({inner}) cannot be biased.",
            remedy=f"Supported, with any optimizer but Muon: {', '.join(LAYOUTS)}"
            " (ZeRO 0 to 3 without ZenFlow and SuperOffload).",
        )
    return LAYOUTS[name](found)


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    """The model's parameters that one of DeepSpeed's optimizers steps."""
    names = ("bit16_groups", "bf16_groups", "fp16_groups")
    groups = next(getattr(optimizer, name) for name in names if hasattr(optimizer, name))
    return [parameter for group in groups for parameter in group]


def hook_step(
    optimizer: Any,
    before: Callable[[], object],
    skipped: Callable[[], object],
    after: Callable[[], object],
) -> Callable[[], None]:
    """Call `before` at the start of `optimizer.step()`, which the engine calls at boundaries only.

    `skipped` is called after a step that was not taken because of an overflow, `after` after each.

    Returns:
        What undoes it, in any order with other wrappers of `step`.
    """
    original = optimizer.step
    is_active = True

    def step(*arguments: Any, **options: Any) -> Any:
        if not is_active:
            return original(*arguments, **options)
        before()
        result = original(*arguments, **options)
        if getattr(optimizer, "overflow", False):
            skipped()
        after()
        return result

    def remove() -> None:
        nonlocal is_active
        is_active = False
        if optimizer.__dict__.get("step") is step:
            optimizer.step = original

    optimizer.step = step
    return remove


def _parameter(unit: Unit) -> Any:
    assert unit.parameter is not None
    return unit.parameter

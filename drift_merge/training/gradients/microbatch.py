"""when="microbatch": bias every local gradient in every backward pass, as the reference code does.

For comparison. The bias of K micro-batches on W ranks adds up to one that is about sqrt(K * W)
times stronger than once per step, wherever noise dominates their gradients; a loss scale, and a
module that is run twice (gradient checkpointing), add to it.

Source: the released code of DRIFT (arXiv 2510.15050), which hooks every parameter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drift_merge.errors import RecipeError
from drift_merge.training.gradients.layout import GradientLayout, PlainLayout
from drift_merge.training.units import Region, Unit

Hook = Callable[[Tensor], Tensor]


class HookLayout:
    """The gradient that a hook was given, for the units of one parameter."""

    loss_scale = None

    def __init__(self) -> None:
        self.given: Tensor | None = None  # a contiguous copy

    def wait(self) -> None:
        """Nothing to wait for."""

    def region(self, unit: Unit) -> Region | None:
        """All of it: gradients are whole before they are reduced."""
        return Region(flat=(0, unit.numel))

    def gradient(self, unit: Unit) -> Tensor | None:
        """The unit's rows of it."""
        if self.given is None:
            return None
        return self.given.view(-1)[unit.begin : unit.begin + unit.numel]

    def put(self, unit: Unit, gradient: Tensor) -> None:
        """Nothing to do: `gradient` is a view."""

    def values(self, unit: Unit) -> Tensor | None:
        """The unit's rows of the parameter."""
        return PlainLayout().values(unit)

    def group(self, unit: Unit) -> ProcessGroup | None:
        """None: every rank biases its own."""
        return None


def hook_parameter(parameter: nn.Parameter, layout: HookLayout, bias: Callable[[], None]) -> Any:
    """Bias the gradient of a parameter whenever a backward pass has computed it.

    Returns:
        torch's handle, with `remove()`.
    """

    def hook(gradient: Tensor) -> Tensor:
        layout.given = gradient.detach().clone(memory_format=torch.contiguous_format)
        bias()
        given, layout.given = layout.given, None
        return given

    return parameter.register_hook(hook)  # type: ignore[no-untyped-call]


def require_hookable(units: Sequence[Unit], layout: GradientLayout) -> None:
    """Refuse parameters whose local gradients no hook sees whole.

    Raises:
        RecipeError: LoRA, FSDP2, ZeRO-3.
    """
    reasons = {
        "LoRA trains factors, not the weights": any(unit.is_adapted for unit in units),
        "under FSDP2 hooks on parameters never run": any(
            hasattr(unit.parameter, "placements") for unit in units
        ),
        "under ZeRO-3 a rank holds only pieces of parameters": any(
            hasattr(unit.parameter, "ds_id") for unit in units
        ),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise RecipeError(
                f"when='microbatch' cannot work here: {reason}.",
                remedy="Use when='step', which gives the same result under every engine.",
            )

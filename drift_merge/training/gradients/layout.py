"""Gives the gradients that this rank holds: the protocol of all providers, and the plain one.

One small provider for each gradient layout; a parameter's layout is static once the optimizer
exists.
"""

from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.errors import RecipeError
from drift_merge.training.units import Region, Unit


class GradientLayout(Protocol):
    """What an injection must know of the way gradients are stored."""

    @property
    def loss_scale(self) -> float | Tensor | None:
        """What gradients are still multiplied with at the time of the step; None for 1."""

    def wait(self) -> None:
        """Wait until gradients have arrived where `gradient` finds them; once before each step."""

    def region(self, unit: Unit) -> Region | None:
        """The part of a unit on this rank; None: nothing of it."""

    def gradient(self, unit: Unit) -> Tensor | None:
        """The local gradient in the shape of the region, to be written to; None: there is none.

        A view, or a copy that `put` stores.
        """

    def put(self, unit: Unit, gradient: Tensor) -> None:
        """Store a gradient that was written to; nothing to do where it is a view."""

    def values(self, unit: Unit) -> Tensor | None:
        """The local values of the parameter, in the shape of the region."""

    def group(self, unit: Unit) -> ProcessGroup | None:
        """The ranks whose sums add up to those of the whole unit; None: this one has it all."""


class PlainLayout:
    """Every rank has whole gradients: a single process, DDP, torch.compile."""

    loss_scale = None

    def __init__(self, replicas: ProcessGroup | None = None) -> None:
        """Keep the ranks whose gradients are equal after backward (DDP's), if there are several."""
        self.replicas = replicas

    def wait(self) -> None:
        """Nothing to wait for."""

    def region(self, unit: Unit) -> Region | None:
        """All of it."""
        return Region(flat=(0, unit.numel))

    def gradient(self, unit: Unit) -> Tensor | None:
        """The unit's rows of `parameter.grad`, flat; a copy where they are not contiguous."""
        assert unit.parameter is not None
        gradient = unit.parameter.grad
        if gradient is not None and gradient.is_sparse:
            raise RecipeError(
                f"the gradient of {unit.parameter_name} is sparse; a delta is not.",
                remedy="Make the embedding with sparse=False, or leave embed out.",
            )
        return None if gradient is None else _rows(gradient, unit)

    def put(self, unit: Unit, gradient: Tensor) -> None:
        """Write the copy back that `gradient` made of a tensor with other strides."""
        assert unit.parameter is not None
        whole = unit.parameter.grad
        if whole is not None and not whole.is_contiguous():
            flat = whole.reshape(-1)
            flat[unit.begin : unit.begin + unit.numel] = gradient
            whole.copy_(flat.view(whole.shape))

    def values(self, unit: Unit) -> Tensor | None:
        """The unit's rows of the parameter, flat."""
        assert unit.parameter is not None
        return _rows(unit.parameter.detach(), unit)

    def group(self, unit: Unit) -> ProcessGroup | None:
        """None: gradients are equal on all ranks."""
        return None


def _rows(tensor: Tensor, unit: Unit) -> Tensor:
    return tensor.reshape(-1).narrow(0, unit.begin, unit.numel)

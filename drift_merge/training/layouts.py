"""Where local gradients lie: the protocol of the providers, the plain one, and the choice.

One small provider for each gradient layout; a parameter's layout is static once the optimizer
exists.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drift_merge.errors import RecipeError
from drift_merge.training.hooks import unwrap_accelerated
from drift_merge.training.units import Region, Unit

_SHARDED = ("placements", "_hp_mapping", "ds_id")  # of parameters: DTensor, ZeRO-1 and 2, ZeRO-3


class GradientLayout(Protocol):
    """What an injection must know of the way gradients are stored."""

    @property
    def loss_scale(self) -> float | Tensor | None:
        """What gradients are still multiplied with at the time of the step; None for 1."""

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


def layout_for(model: nn.Module, optimizer: Any = None) -> GradientLayout:
    """Choose the provider for a model and its optimizer.

    Args:
        model: as it is trained, after fully_shard() or deepspeed.initialize().
        optimizer: DeepSpeed's engine or ZeRO optimizer, any other, accelerate's, or None.
    """
    from drift_merge.training import deepspeed, sharded

    optimizer = unwrap_accelerated(optimizer)
    if deepspeed.is_deepspeed(optimizer) or deepspeed.is_deepspeed(model):
        return deepspeed.layout_for(model, optimizer)
    return sharded.ShardedLayout() if sharded.is_sharded(model) else PlainLayout()


def require_current(model: nn.Module, units: Iterable[Unit], layout: GradientLayout) -> None:
    """Refuse a model whose parameters or engine are others than when the handle was attached.

    Args:
        model: that was attached to, as it is now.
        units: matched then.
        layout: chosen then.

    Raises:
        RecipeError: their gradients would never be seen.
    """
    live = dict(model.named_parameters(remove_duplicate=False))
    replaced = [
        unit.parameter_name
        for unit in units
        if unit.parameter is not None
        and live.get(unit.parameter_name, unit.parameter) is not unit.parameter
        and not hasattr(unit.parameter, "placements")  # FSDP2 may show gathered ones for a while
    ]
    is_sharded = any(hasattr(p, mark) for p in model.parameters() for mark in _SHARDED)
    if not replaced and not (is_sharded and isinstance(layout, PlainLayout)):
        return
    what = f"{len(replaced):,} parameters were replaced" if replaced else "the model was sharded"
    name = f", e.g. {replaced[0]}" if replaced else ""
    raise RecipeError(
        f"{what} after attach(){name}: gradients would go by without a bias.",
        remedy="Call attach() after fully_shard() or deepspeed.initialize(), with the optimizer"
        " that steps the sharded parameters.",
    )


def _rows(tensor: Tensor, unit: Unit) -> Tensor:
    return tensor.reshape(-1).narrow(0, unit.begin, unit.numel)

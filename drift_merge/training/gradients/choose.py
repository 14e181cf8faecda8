"""Chooses the provider of gradients for a model and its optimizer; tells when it is outdated."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from drift_merge.errors import RecipeError
from drift_merge.training.gradients.hooks import unwrap_accelerated
from drift_merge.training.gradients.layout import GradientLayout, PlainLayout
from drift_merge.training.gradients.zero_partitions import several
from drift_merge.training.units import Unit

_SHARDED = ("placements", "_hp_mapping", "ds_id")  # of parameters: DTensor, ZeRO-1 and 2, ZeRO-3


def layout_for(model: nn.Module, optimizer: Any = None) -> GradientLayout:
    """Choose the provider for a model and its optimizer.

    Args:
        model: as it is trained, after fully_shard() or deepspeed.initialize().
        optimizer: DeepSpeed's engine or ZeRO optimizer, any other, accelerate's, or None.
    """
    from drift_merge.training.gradients import deepspeed, sharded

    optimizer = unwrap_accelerated(optimizer)
    if deepspeed.is_deepspeed(optimizer) or deepspeed.is_deepspeed(model):
        return deepspeed.deepspeed_layout(model, optimizer)
    if sharded.is_sharded(model):
        return sharded.ShardedLayout()
    return PlainLayout(_replicas(model))


def _replicas(model: nn.Module) -> ProcessGroup | None:
    """The ranks of DDP, if there are several; all of a model's parts have the same."""
    wrapped = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
    group: ProcessGroup | None = next((m.process_group for m in wrapped), None)
    return None if group is None else several(group)


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

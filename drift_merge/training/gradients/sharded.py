"""Gradients that are DTensors: FSDP2 (`fully_shard`), HSDP meshes, tensor parallelism.

A rank holds a rectangular block of a parameter and of its gradient, reads the same block of
delta, and adds its sums over the mesh dimensions that shard the parameter. Over those that
repeat it (HSDP) every rank has the same sums already. Parameters that are no DTensors are whole.

Source: `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drift_merge.errors import RecipeError
from drift_merge.names.tensors import Shape
from drift_merge.training.units import Region, Unit

Bounds = tuple[tuple[int, int], ...]  # [first, last) in every dimension of a parameter


class ShardedLayout:
    """Where the units of a model with DTensors lie on this rank."""

    loss_scale = None  # FSDP2 has none of its own, and GradScaler has unscaled before the step

    def __init__(self) -> None:
        self._views: dict[Unit, tuple[int | slice, ...] | None] = {}
        self._groups: dict[tuple[int, tuple[int, ...]], ProcessGroup] = {}

    def wait(self) -> None:
        """Nothing to wait for: FSDP2 waits for offloaded gradients at the end of backward."""

    def region(self, unit: Unit) -> Region | None:
        """The block of the unit that this rank holds, or None."""
        own, held = _bounds_of(unit), _local_bounds(_parameter(unit))
        common = _intersection(own, held)
        if common is None:
            return None
        leading = len(own) - len(unit.shape)
        pairs = zip(common[leading:], own[leading:], strict=True)
        return Region(slices=tuple(slice(a - low, b - low) for (a, b), (low, _) in pairs))

    def gradient(self, unit: Unit) -> Tensor | None:
        """The local gradient of the region, as a view; None if there is none."""
        parameter = _parameter(unit)
        gradient: Any = parameter.grad
        if gradient is None:
            return None
        if is_dtensor(gradient) and gradient.placements != parameter.placements:
            # Tensor parallelism may leave sums that are still to be reduced (Partial).
            gradient = gradient.redistribute(placements=parameter.placements)
            parameter.grad = gradient
        return self._view(unit, gradient)

    def put(self, unit: Unit, gradient: Tensor) -> None:
        """Nothing to do: `gradient` is a view."""

    def values(self, unit: Unit) -> Tensor | None:
        """The local values of the parameter in the same region."""
        return self._view(unit, _parameter(unit).detach())

    def group(self, unit: Unit) -> ProcessGroup | None:
        """The ranks whose sums add up to those of the whole unit; None if one has all of it."""
        parameter = _parameter(unit)
        if not is_dtensor(parameter):
            return None
        mesh = parameter.device_mesh
        dims = tuple(
            dim
            for dim, placement in enumerate(parameter.placements)
            if hasattr(placement, "dim") and mesh.size(dim) > 1  # Shard and _StridedShard
        )
        if not dims:
            return None
        key = (id(mesh), dims)
        if key not in self._groups:
            self._groups[key] = _group(mesh, dims)
        return self._groups[key]

    def _view(self, unit: Unit, values: Any) -> Tensor | None:
        if unit not in self._views:
            self._views[unit] = _local_index(unit)
        index = self._views[unit]
        if index is None:
            return None
        local: Tensor = values.to_local() if is_dtensor(values) else values
        return local[index]


def is_dtensor(values: Any) -> bool:
    """Whether a tensor is a DTensor, without importing them where there are none."""
    return hasattr(values, "device_mesh") and hasattr(values, "placements")


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of a model is a DTensor.

    Raises:
        RecipeError: `fully_shard` is at work but has just gathered the parameters: the tensors
            that the optimizer steps on are others.
    """
    sharded = any(is_dtensor(parameter) for parameter in model.parameters())
    for path, module in model.named_modules():
        if not hasattr(module, "_get_fsdp_state"):  # FSDPModule
            continue
        parameters = list(module.parameters())
        if parameters and not any(map(is_dtensor, parameters)):
            raise RecipeError(
                f"the parameters of {path or 'the model'} are gathered (FSDP2, after a forward"
                " pass), not sharded.",
                remedy="Call attach() before the first forward pass, or model.reshard() first.",
            )
    return sharded


def _parameter(unit: Unit) -> Any:
    assert unit.parameter is not None
    return unit.parameter


def _bounds_of(unit: Unit) -> Bounds:
    """The block of a unit within its parameter.

    Raises:
        RecipeError: the unit is no rectangle there.
    """
    shape: Shape = tuple(_parameter(unit).shape)
    leading = len(shape) - len(unit.shape)
    begin, bounds = unit.begin, []
    for dim in range(len(shape)):
        first, begin = divmod(begin, prod(shape[dim + 1 :]))
        extent = 1 if dim < leading else unit.shape[dim - leading]
        bounds.append((first, first + extent))
    if leading < 0 or any(b > size for (_, b), size in zip(bounds, shape, strict=True)):
        raise RecipeError(
            f"{unit.name}: {unit.shape} from element {unit.begin} on is no block of"
            f" {unit.parameter_name}, shape {shape}, which is sharded.",
            remedy="Report the model's class: this fusion is known for whole parameters only.",
        )
    return tuple(bounds)


def _local_bounds(parameter: Any) -> Bounds:
    """The block of a parameter that this rank holds; empty where it holds nothing."""
    if not is_dtensor(parameter):
        return tuple((0, size) for size in parameter.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    if tuple(sizes) != tuple(parameter.to_local().shape):
        raise RecipeError(
            f"a DTensor of shape {tuple(parameter.shape)} placed {parameter.placements} holds"
            f" {tuple(parameter.to_local().shape)} here, expected {tuple(sizes)}.",
            remedy="Shard with fully_shard() or parallelize_module() alone.",
        )
    return tuple((offset, offset + size) for size, offset in zip(sizes, offsets, strict=True))


def _intersection(one: Bounds, other: Bounds) -> Bounds | None:
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(a >= b for a, b in common) else common


def _local_index(unit: Unit) -> tuple[int | slice, ...] | None:
    """How the unit's region is cut from the local tensor; None: nothing of it is here."""
    held = _local_bounds(_parameter(unit))
    common = _intersection(_bounds_of(unit), held)
    if common is None:
        return None
    leading = len(held) - len(unit.shape)
    inside = [slice(a - low, b - low) for (a, b), (low, _) in zip(common, held, strict=True)]
    return (*(part.start for part in inside[:leading]), *inside[leading:])


def _group(mesh: Any, dims: Sequence[int]) -> ProcessGroup:
    """The process group of some dimensions of a mesh. All ranks call it in the same order."""
    group: ProcessGroup
    if len(dims) == 1:
        group = mesh.get_group(dims[0])
    elif len(dims) == mesh.ndim and mesh.size() == torch.distributed.get_world_size():
        assert torch.distributed.group.WORLD is not None
        group = torch.distributed.group.WORLD
    elif mesh.mesh_dim_names is None:
        raise RecipeError(
            f"a parameter is sharded over {len(dims)} dimensions of a mesh without names.",
            remedy="Name them: init_device_mesh(..., mesh_dim_names=('dp', 'tp'))",
        )
    else:
        group = mesh[tuple(mesh.mesh_dim_names[dim] for dim in dims)]._flatten().get_group()
    return group

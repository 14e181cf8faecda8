"""Gradients under ZeRO-1 and 2: the parameters of a group laid end to end and cut by ranks.

DeepSpeed links a parameter to its fragment (`_hp_mapping`), but to a wrong one where
`round_robin_gradients` has changed the order (0.19.8). So the places are computed here, from the
order in which the optimizer has laid the parameters.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.training.units import Region, Unit


@dataclass(frozen=True, slots=True)
class _Place:
    """What this rank holds of a parameter."""

    group: int  # of the optimizer's parameter groups
    index: int  # among the averaged gradients of the group
    start: int  # first element of the parameter
    numel: int
    offset: int  # of that element in this rank's partition of the group


class PartitionedLayout:
    """A rank's fragment of a parameter, if it has one."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._is_offloaded = bool(getattr(optimizer, "cpu_offload", False))
        self._places: dict[int, _Place] = {}
        self._groups: dict[int, ProcessGroup] = {}
        for number, parameters in enumerate(optimizer.round_robin_bit16_groups):
            self._groups |= {id(p): optimizer.real_dp_process_group[number] for p in parameters}
            self._places |= {id(p): place for p, place in _places(optimizer, number)}

    @property
    def loss_scale(self) -> float | Tensor | None:
        """What the gradients are still multiplied with; None for 1."""
        return loss_scale_of(self._optimizer)

    def wait(self) -> None:
        """With offload, wait for the copies of gradients to the host.

        DeepSpeed copies without blocking and waits at the beginning of its own step, which is
        after the bias: that would read, and bias, what the copies are about to overwrite.
        """
        if not self._is_offloaded:
            return
        wait = getattr(self._optimizer, "_wait_for_offload_copies", None)
        if wait is not None:
            wait()
            return
        module: Any = sys.modules.get("deepspeed.accelerator")
        if module is not None:
            module.get_accelerator().synchronize()
        elif torch.cuda.is_available():
            torch.cuda.synchronize()

    def region(self, unit: Unit) -> Region | None:
        """The part of the unit in this rank's partition, or None; all of a frozen parameter."""
        if id(unit.parameter) not in self._groups:
            return Region(flat=(0, unit.numel))
        place = self._places.get(id(unit.parameter))
        return (
            None if place is None else region_within(unit, place.start, place.start + place.numel)
        )

    def gradient(self, unit: Unit) -> Tensor | None:
        """The averaged gradient of the region, as a view; None before the boundary."""
        place = self._places.get(id(unit.parameter))
        fragment = None if place is None else self._fragment(place)
        return None if place is None or fragment is None else _cut(unit, place, fragment)

    def put(self, unit: Unit, gradient: Tensor) -> None:
        """`gradient` is a view; with offload, the norm that was taken of it is taken again."""
        place = self._places[id(unit.parameter)]
        fragment = self._fragment(place) if self._is_offloaded else None
        if fragment is not None:
            name = self._optimizer.get_param_id(unit.parameter)
            self._optimizer.norm_for_param_grads[name] = torch.linalg.vector_norm(fragment)

    def values(self, unit: Unit) -> Tensor | None:
        """The master values of the region; a frozen parameter's own (LoRA's base)."""
        if id(unit.parameter) not in self._groups:
            assert unit.parameter is not None
            return unit.parameter.detach().reshape(-1).narrow(0, unit.begin, unit.numel)
        place = self._places.get(id(unit.parameter))
        if place is None:
            return None
        partition = self._optimizer.single_partition_of_fp32_groups[place.group].detach()
        return _cut(unit, place, partition.view(-1).narrow(0, place.offset, place.numel))

    def group(self, unit: Unit) -> ProcessGroup | None:
        """The ranks that share the partition, this one included whatever it holds."""
        group = self._groups.get(id(unit.parameter))
        return None if group is None else several(group)

    def _fragment(self, place: _Place) -> Tensor | None:
        """This rank's part of the gradient of the whole parameter, flat."""
        if self._is_offloaded:
            whole = self._optimizer.single_partition_of_fp32_groups[place.group].grad
            return None if whole is None else whole.view(-1).narrow(0, place.offset, place.numel)
        averaged = self._optimizer.averaged_gradients.get(place.group)
        return None if averaged is None else averaged[place.index].view(-1)


def loss_scale_of(optimizer: Any) -> float | Tensor | None:
    """What one of DeepSpeed's optimizers will divide its gradients by; None for 1."""
    scaler = getattr(optimizer, "torch_autocast_gradscaler", None)
    if scaler is not None:
        scale: Tensor = scaler._get_scale_async()  # get_scale() would wait for the device
        return scale
    found = getattr(optimizer, "loss_scale", None)
    return None if found is None or found == 1 else float(found)


def region_within(unit: Unit, start: int, stop: int) -> Region | None:
    """The part of a unit in elements [start, stop) of its parameter."""
    begin = max(unit.begin, start) - unit.begin
    end = min(unit.begin + unit.numel, stop) - unit.begin
    return Region(flat=(begin, end)) if begin < end else None


def several(group: ProcessGroup) -> ProcessGroup | None:
    """A group of more than one rank; None for one of a single rank."""
    return group if torch.distributed.get_world_size(group) > 1 else None


def _places(optimizer: Any, number: int) -> Iterator[tuple[Any, _Place]]:
    """Parameters of which this rank holds something, in the order of the partition."""
    parameters = optimizer.round_robin_bit16_groups[number]
    size = int(optimizer.partition_size[number])
    begin = size * torch.distributed.get_rank(optimizer.real_dp_process_group[number])
    offsets = getattr(optimizer, "round_robin_bit16_offsets", None)  # with parameter_alignment
    at = filled = index = 0
    for position, parameter in enumerate(parameters):
        at = at if offsets is None else offsets[number][position]
        start, stop = max(at, begin), min(at + parameter.numel(), begin + size)
        if start < stop:
            index += int(start - begin > filled)  # a tensor of padding lies before it
            yield parameter, _Place(number, index, start - at, stop - start, start - begin)
            filled, index = stop - begin, index + 1
        at += parameter.numel()


def _cut(unit: Unit, place: _Place, fragment: Tensor) -> Tensor | None:
    region = region_within(unit, place.start, place.start + place.numel)
    if region is None or region.flat is None:
        return None
    begin, end = region.flat
    return fragment.narrow(0, unit.begin + begin - place.start, end - begin)

"""Keeps deltas where the gradients are: read from the map, resident on the GPU, or streamed to it.

On a CPU the map of the prior's files is read directly. For gradients on a GPU all regions of
this rank are made resident there if they fit; otherwise one unit at a time passes through
pinned memory, the next one on a side stream while this one is used.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from drift_merge.maths.lowrank import Rectangle, product
from drift_merge.names.tensors import matrix_shape
from drift_merge.training.deltas.files import DeltaSource, FileDeltas
from drift_merge.training.units import Block, Region, Unit, blocks_of, region_shape

_PASS = 2**22  # elements that are widened on the host at once
_HEADROOM = 0.9  # of the memory that is free; activations and fragments need the rest
Regions = Mapping[Unit, Region]


def place(
    source: DeltaSource,
    regions: Regions,
    device: torch.device,
    *,
    wanted: str,
    dtype: torch.dtype,
    state_bytes: int,
) -> DeltaSource:
    """Choose where deltas wait.

    Args:
        source: of the priors' files.
        regions: the region of every unit on this rank, in the order of use.
        device: where gradients lie.
        wanted: one of `training.options.DEVICES`.
        dtype: in which deltas are held on the device, that of the prior.
        state_bytes: what the optimizer will still allocate on the device.
    """
    if device.type != "cuda":
        return source
    files = source if isinstance(source, FileDeltas) else None
    dense = {u: r for u, r in regions.items() if files is None or not files.is_factored(u)}
    held = _place_dense(source, dense, device, wanted=wanted, dtype=dtype, state_bytes=state_bytes)
    return held if files is None or len(dense) == len(regions) else WithFactors(held, files)


def _place_dense(
    source: DeltaSource,
    regions: Regions,
    device: torch.device,
    *,
    wanted: str,
    dtype: torch.dtype,
    state_bytes: int,
) -> DeltaSource:
    size = sum(numel_of(unit, region) for unit, region in regions.items()) * dtype.itemsize
    if wanted == "cuda" or (wanted == "auto" and size + state_bytes < _free_bytes(device)):
        return _resident(source, regions, device, dtype)
    return StreamedDeltas(source, regions, device, dtype)


def _free_bytes(device: torch.device) -> float:
    """What torch can still allocate on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _HEADROOM * (free + cached)


def numel_of(unit: Unit, region: Region) -> int:
    """Number of elements of a region."""
    return prod(region_shape(unit, region))


def _fill(source: DeltaSource, unit: Unit, region: Region, out: Tensor) -> None:
    """Write the whole region of a unit to host memory, flat, in the dtype of `out`."""
    begin = 0
    for block in blocks_of(unit, region, _PASS):
        wide = torch.empty(block.numel)
        source.chunk(unit, begin, block, wide)
        out[begin : begin + block.numel].copy_(wide)
        begin += block.numel


class WithFactors:
    """Deltas of low rank by their factors, which are small; all others where they were placed."""

    def __init__(self, held: DeltaSource, source: FileDeltas) -> None:
        self._held, self._source = held, source

    @property
    def is_streamed(self) -> bool:
        """Whether the others are."""
        return self._held.is_streamed

    def factors(self, unit: Unit, block: Block, like: Tensor) -> Sequence[Rectangle] | None:
        """A block of a unit's delta by factors."""
        return self._source.factors(unit, block, like)

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Write a chunk, made from the factors or taken from where it is held."""
        parts = self.factors(unit, block, out)
        if parts is None:
            self._held.chunk(unit, begin, block, out)
        else:
            product(parts, out.view(block.rows, block.cols))

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows that are held; of low rank, made on the host."""
        source = self._source if self._source.is_factored(unit) else self._held
        return source.rows(unit, first, end)


class Resident:
    """Every region of this rank in tensors: on the device, or mapped from a file."""

    is_streamed = False

    def factors(self, unit: Unit, block: Block, like: Tensor) -> None:
        """Deltas are held as they are."""

    def __init__(self, held: Mapping[Unit, Tensor]) -> None:
        self._held = dict(held)  # flat, in the order of the region

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Widen a chunk of what is held."""
        out.copy_(self._held[unit][begin : begin + block.numel])

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows of what is held."""
        return self._held[unit].view(matrix_shape(unit.shape))[first:end]


def _resident(
    source: DeltaSource, regions: Regions, device: torch.device, dtype: torch.dtype
) -> Resident:
    held = {}
    for unit, region in regions.items():
        host = torch.empty(numel_of(unit, region), dtype=dtype)
        _fill(source, unit, region, host)
        held[unit] = host.to(device)
    return Resident(held)


@dataclass(slots=True)
class _Slot:
    """One place of the ring: pinned host memory, memory of the device, and who is in it."""

    host: Tensor
    device: Tensor
    arrived: Any = None  # event of the side stream: the copy is complete
    used: Any = None  # event of the main stream: nothing queued reads it any more
    unit: Unit | None = None
    filling: "Future[None] | None" = None


class StreamedDeltas:
    """One unit on the device at a time, and the next one on its way."""

    is_streamed = True

    def factors(self, unit: Unit, block: Block, like: Tensor) -> None:
        """Deltas pass by as they are."""

    def __init__(
        self, source: DeltaSource, regions: Regions, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._source, self._regions, self._device = source, dict(regions), device
        order = list(regions)
        self._next = dict(zip(order, order[1:] + order[:1], strict=True))
        self._is_cuda = device.type == "cuda"
        numel = max((numel_of(unit, region) for unit, region in regions.items()), default=0)
        self._slots = [
            _Slot(
                torch.empty(numel, dtype=dtype, pin_memory=self._is_cuda),
                torch.empty(numel, dtype=dtype, device=device),
            )
            for _ in range(2)
        ]
        self._stream: Any = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        # Reading the map takes a core for a while; the training loop must not wait for it.
        self._reader = ThreadPoolExecutor(1, "drift_merge")

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Widen a chunk of the unit that is on the device."""
        out.copy_(self._arrive(unit)[begin : begin + block.numel])

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows of the unit that is on the device."""
        return self._arrive(unit)[: unit.numel].view(matrix_shape(unit.shape))[first:end]

    def _arrive(self, unit: Unit) -> Tensor:
        """Wait for a unit on the main stream, and send for the one after it."""
        slot = next((slot for slot in self._slots if slot.unit is unit), None)
        if slot is None:
            slot = self._slots[0] if self._slots[0].filling is None else self._slots[1]
            self._send(unit, slot)
        if slot.filling is not None:
            slot.filling.result()
            slot.filling = None
            if self._is_cuda:
                torch.cuda.current_stream(self._device).wait_event(slot.arrived)
            other = self._slots[0] if slot is self._slots[1] else self._slots[1]
            if len(self._next) > 1:
                self._send(self._next[unit], other)
        return slot.device

    def _send(self, unit: Unit, slot: _Slot) -> None:
        """Read a unit into pinned memory and copy it to the device, behind the caller's back."""
        if slot.filling is not None:
            slot.filling.result()
        if self._is_cuda:
            slot.used = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.used.record(torch.cuda.current_stream(self._device))
        slot.unit = unit
        slot.filling = self._reader.submit(self._carry, unit, slot)

    def _carry(self, unit: Unit, slot: _Slot) -> None:
        region = self._regions[unit]
        numel = numel_of(unit, region)
        if self._is_cuda and slot.arrived is not None:
            slot.arrived.synchronize()  # the pinned memory is still being copied from
        _fill(self._source, unit, region, slot.host[:numel])
        with torch.cuda.stream(self._stream) if self._is_cuda else nullcontext():
            if self._is_cuda:
                self._stream.wait_event(slot.used)
            slot.device[:numel].copy_(slot.host[:numel], non_blocking=True)
            if self._is_cuda:
                slot.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                slot.arrived.record(self._stream)

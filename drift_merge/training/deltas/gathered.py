"""Deltas of which each rank of DDP holds 1/N on its device; a layer is gathered when it is needed.

Under DDP every rank biases the same whole gradients. Instead of N copies in N devices' memory each
keeps its share of every layer's packed bytes, and one all-gather brings a layer together, while
the one before it is used. Ranks must gather in the same order: they go through all layers in a
circle, whatever they ask for, and `end_step` brings each to the end of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.training.deltas.files import Direct
from drift_merge.training.deltas.packed import ALIGNMENT, Packing, Packs, Regions
from drift_merge.training.units import Block, Region, Unit

# Renamed in torch 2.13, where the old name warns.
_all_gather: Any = (
    getattr(torch.distributed, "all_gather_single", None)
    or torch.distributed.all_gather_into_tensor
)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The units of a layer, one buffer after the other."""

    begins: dict[Unit, int]  # first byte of each unit's buffer
    size_bytes: int  # of all, filled up to a multiple of the ranks
    share: Tensor  # this rank's part, on the device; flat, uint8


@dataclass(slots=True)
class _Place:
    """Memory for one whole layer."""

    buffer: Tensor
    layer: int = -1
    work: Any = None  # of an all-gather that nobody has waited for


class GatheredDeltas:
    """A layer on the device at a time, and the next one on its way."""

    def __init__(
        self, packs: Packs, regions: Regions, device: torch.device, group: ProcessGroup
    ) -> None:
        self._group = group
        self._packings = {unit: packs.packing(unit, region) for unit, region in regions.items()}
        self._layers = [
            self._share(packs, regions, units, device) for units in by_layer(list(regions))
        ]
        self._layer_of = {u: n for n, layer in enumerate(self._layers) for u in layer.begins}
        largest = max((layer.size_bytes for layer in self._layers), default=0)
        self._places = [
            _Place(torch.empty(largest, dtype=torch.uint8, device=device))
            for _ in range(min(2, len(self._layers)))
        ]
        self._count = self._goal = 0  # layers gathered since the beginning, and to be gathered

    def factors(self, unit: Unit, block: Block, like: Tensor) -> None:
        """None: what is here are values."""

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Expand a chunk of the layer that is on the device."""
        packing, buffer = self.packed(unit)
        packing.expand(buffer, begin, block, out)

    def direct(self, unit: Unit, region: Region) -> Direct | None:
        """The region for kernels."""
        packing, buffer = self.packed(unit)
        return packing.direct(buffer, unit, region)

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows of a unit of the layer that is on the device."""
        packing, buffer = self.packed(unit)
        return packing.rows(buffer, unit, first, end)

    def packed(self, unit: Unit) -> tuple[Packing, Tensor]:
        """A unit on the device, as `Resident.packed`; until the layer after the next is asked for.

        All ranks of the group call this together, if it is another layer than the last one's.
        """
        number = self._layer_of[unit]
        place = next((place for place in self._places if place.layer == number), None)
        while place is None or place.work is not None:
            place = self._advance(number)
        begin, packing = self._layers[number].begins[unit], self._packings[unit]
        return packing, place.buffer[begin : begin + packing.size_bytes]

    def end_step(self) -> None:
        """Go through the layers that nobody has asked for in this step; send for the first."""
        self._goal += len(self._layers)
        while self._count <= self._goal and not self._is_whole:
            self._gather()

    def close(self) -> None:
        """Wait until nothing is on its way any more."""
        for place in self._places:
            if place.work is not None:
                place.work.wait()
        self._places = []

    @property
    def _is_whole(self) -> bool:
        """Whether all layers have a place, and were gathered: nothing is to be done again."""
        return len(self._layers) <= len(self._places) and self._count >= len(self._layers)

    def _advance(self, number: int) -> _Place | None:
        """Wait for a layer if it is on its way, and send for the one after it."""
        place = next((place for place in self._places if place.layer == number), None)
        if place is None:
            self._gather()
            return None
        if place.work is not None:
            place.work.wait()  # a GPU's stream waits, not the host
            place.work = None
            is_next = self._count % len(self._layers) == (number + 1) % len(self._layers)
            if is_next and not self._is_whole:
                self._gather()
        return place

    def _gather(self) -> None:
        """Bring the next layer of the circle together."""
        number = self._count % len(self._layers)
        place = self._places[self._count % len(self._places)]
        if place.work is not None:
            place.work.wait()
        layer = self._layers[number]
        place.layer = number
        place.work = _all_gather(
            place.buffer[: layer.size_bytes], layer.share, group=self._group, async_op=True
        )
        self._count += 1

    def _share(
        self, packs: Packs, regions: Regions, units: Sequence[Unit], device: torch.device
    ) -> _Layer:
        """Pack a layer on the host, and keep this rank's part of it on the device."""
        ranks = torch.distributed.get_world_size(self._group)
        own = torch.distributed.get_rank(self._group)
        begins, at = {}, 0
        for unit in units:
            begins[unit] = at
            at += self._packings[unit].size_bytes
        size = -(-at // (ranks * ALIGNMENT)) * ranks * ALIGNMENT
        host = torch.zeros(size, dtype=torch.uint8)
        for unit, begin in begins.items():
            packs.pack(unit, regions[unit], host[begin:])
        share = host[own * size // ranks : (own + 1) * size // ranks]
        return _Layer(begins, size, share.to(device, copy=True))


def by_layer(units: Sequence[Unit]) -> list[list[Unit]]:
    """Runs of units of one layer, in the order of use."""
    runs: list[list[Unit]] = []
    for unit in units:
        if not runs or runs[-1][0].layer != unit.layer:
            runs.append([])
        runs[-1].append(unit)
    return runs

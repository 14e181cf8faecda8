"""Every region of this rank in memory, packed: on the device, or mapped from a file."""

from collections.abc import Mapping
from concurrent.futures import Executor

import torch
from torch import Tensor

from drift_merge.training.deltas.files import Direct
from drift_merge.training.deltas.packed import Packing, Packs, Regions, plain_packing
from drift_merge.training.units import Block, Region, Unit


class Resident:
    """Deltas that stay where they are."""

    def __init__(self, held: Mapping[Unit, tuple[Packing, Tensor]]) -> None:
        self._held = dict(held)  # the buffers are flat, uint8

    @classmethod
    def of_values(cls, values: Mapping[Unit, Tensor]) -> "Resident":
        """Regions that were computed: flat, in their order, any float dtype."""
        return cls(
            {
                unit: (plain_packing(flat.numel(), flat.dtype), flat.view(torch.uint8))
                for unit, flat in values.items()
            }
        )

    @classmethod
    def copied(cls, packs: Packs, regions: Regions, device: torch.device) -> "Resident":
        """Copy all regions to a device, as stored."""
        held = {}
        for unit, region in regions.items():
            packing = packs.packing(unit, region)
            host = torch.empty(packing.size_bytes, dtype=torch.uint8)
            packs.pack(unit, region, host)
            held[unit] = (packing, host.to(device))
        return cls(held)

    def packed(self, unit: Unit) -> tuple[Packing, Tensor]:
        """The packing and the buffer of a unit."""
        return self._held[unit]

    def factors(self, unit: Unit, block: Block, like: Tensor) -> None:
        """None: what is here are values."""

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Expand a chunk of what is held."""
        packing, buffer = self._held[unit]
        packing.expand(buffer, begin, block, out)

    def direct(self, unit: Unit, region: Region) -> Direct | None:
        """The region for kernels."""
        packing, buffer = self.packed(unit)
        return packing.direct(buffer, unit, region)

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows of what is held."""
        packing, buffer = self._held[unit]
        return packing.rows(buffer, unit, first, end)

    def packing(self, unit: Unit, region: Region) -> Packing:
        """As `Packs.packing`."""
        return self._held[unit][0]

    def pack(
        self, unit: Unit, region: Region, out: Tensor, readers: Executor | None = None
    ) -> None:
        """As `Packs.pack`."""
        buffer = self._held[unit][1]
        out[: buffer.numel()].copy_(buffer)

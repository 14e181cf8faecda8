"""Deltas of low rank beside others: by their factors, which are small, on the device."""

from collections.abc import Sequence

from torch import Tensor

from drift_merge.maths.lowrank import Rectangle, product
from drift_merge.training.deltas.files import DeltaSource, Direct, FileDeltas
from drift_merge.training.units import Block, Region, Unit


class WithFactors:
    """Deltas of low rank by their factors; all others where they were placed."""

    def __init__(self, held: DeltaSource, files: FileDeltas) -> None:
        self.held, self._files = held, files

    def factors(self, unit: Unit, block: Block, like: Tensor) -> Sequence[Rectangle] | None:
        """A block of a unit's delta by factors."""
        return self._files.factors(unit, block, like)

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Write a chunk, made from the factors or taken from where it is held."""
        parts = self.factors(unit, block, out)
        if parts is None:
            self.held.chunk(unit, begin, block, out)
        else:
            product(parts, out.view(block.rows, block.cols))

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows that are held; of low rank, made on the host."""
        source = self._files if self._files.is_factored(unit) else self.held
        return source.rows(unit, first, end)

    def direct(self, unit: Unit, region: Region) -> Direct | None:
        """The region where it is held; None where there are factors."""
        return None if self._files.is_factored(unit) else self.held.direct(unit, region)

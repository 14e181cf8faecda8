"""Reads the values of delta from the memory map of the prior's files.

The prior's files are mapped, so all local ranks share one copy in the page cache, and a rank
touches only the pages of its regions. Several priors are combined with their weights on the
way. How a delta is stored (or compressed) is known to `priors.deltas` alone.

Shapes: a stored delta is seen as a matrix, see `names.tensors.matrix_shape`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from drift_merge.maths.lowrank import LowRank, Rectangle, product, side_by_side
from drift_merge.names.tensors import matrix_shape
from drift_merge.priors.deltas import Deltas
from drift_merge.training.deltas.opened import OpenPrior
from drift_merge.training.units import Block, Region, Unit, region_shape, run_of

_MOST_HELD = 16  # deltas whose factors are kept widened on a CPU


def read_delta(opened: OpenPrior, name: str, block: Block, out: Tensor) -> None:
    """Copy a block of a stored delta to `out`, decompressed.

    Args:
        opened: the prior.
        name: canonical name.
        block: of the stored matrix.
        out: shape (block.rows, block.cols), float32 or float64, written to.
    """
    target = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype)
    width = opened.deltas.matrix(name)[1]
    if block.cols == width:  # whole rows are one range
        begin = block.row * width
        opened.deltas.flat(name, begin, begin + block.numel, target.view(-1))
    else:
        rows, cols = (block.row, block.row + block.rows), (block.col, block.col + block.cols)
        opened.deltas.block(name, rows, cols, target)
    if target is not out:
        out.copy_(target)


@dataclass(frozen=True, slots=True, eq=False)
class Direct:
    """A region's delta as it lies in memory, for kernels that expand it themselves."""

    elements: Tensor  # (n,), contiguous, as stored, in the order of the flattened region
    scales: Tensor | None = None  # float32, where elements are codes
    first: int = 0  # of the first element: its place in a matrix of `width` columns
    width: int = 1
    is_by_column: bool = False  # element i has the scale of its column, else of its row


class DeltaSource(Protocol):
    """Where the values of delta come from."""

    def factors(self, unit: Unit, block: Block, like: Tensor) -> Sequence[Rectangle] | None:
        """A block of a unit's delta by factors, so that it need not be made.

        Args:
            unit: whose.
            block: of the unit.
            like: gives the dtype (float32 or float64) and the device of the factors.

        Returns:
            Parts that add up to the block; None where delta is stored otherwise.
        """

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Write a chunk of a unit's delta to `out`.

        Args:
            unit: whose.
            begin: first element, counted in the flattened region of this rank.
            block: the same elements as a block of the unit.
            out: flat, `block.numel` elements, float32 or float64; on the host or a device.
        """

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows [first, end) of the matrix of a unit that this rank holds whole.

        Returns:
            Shape (end - first, cols), any float dtype.
        """

    def direct(self, unit: Unit, region: Region) -> Direct | None:
        """The region of a unit where it lies in one piece; None: read it with `chunk`.

        Valid until the gradients of its layer are biased.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """The delta of a tensor as one prior's file holds it; windows on the map."""

    values: Tensor  # (rows, cols), any stored dtype
    scales: Tensor | None  # of the rows, where values are codes
    weight: float  # of the prior


class FileDeltas:
    """Deltas as they lie in the files of one or several priors."""

    def __init__(self, priors: Sequence[OpenPrior], weights: Sequence[float]) -> None:
        self.priors, self.weights = tuple(priors), tuple(weights)
        self._factors: dict[tuple[str, torch.device, torch.dtype], LowRank | None] = {}

    def is_factored(self, unit: Unit) -> bool:
        """Whether a unit's delta is known by its factors, in all priors."""
        return all(
            isinstance(opened.deltas, Deltas) and opened.deltas.is_factored(unit.name)
            for opened in self.priors
        )

    def factor_bytes(self, unit: Unit) -> int:
        """Bytes of the factors of the tensor that a unit's delta lies in; 0 if it has none."""
        if not self.is_factored(unit):
            return 0
        return sum(one.u.nbytes + one.v.nbytes for one in self._lowranks(unit.name))

    def _lowranks(self, name: str) -> list[LowRank]:
        """The factors of a delta in every prior that has some."""
        held = [o.deltas.factors(name) for o in self.priors if isinstance(o.deltas, Deltas)]
        return [one for one in held if one is not None]

    def factors(self, unit: Unit, block: Block, like: Tensor) -> list[Rectangle] | None:
        """A block of a unit's delta by factors; of several priors side by side."""
        if not self.is_factored(unit):
            return None
        found = self._held(unit.name, like)
        if found is None:
            return None
        place = unit.origin.span(block)
        rows, cols = (place.row, place.row + place.rows), (place.col, place.col + place.cols)
        parts = found.rectangles(rows, cols)
        if unit.origin.is_transposed:
            return [part.turned() for part in parts]
        picked = (part.every(unit.origin.step) for part in parts)
        return [part for part in picked if len(part.left)]

    def _held(self, name: str, like: Tensor) -> LowRank | None:
        """The factors of a delta in a dtype on a device: all on a GPU, the last few on a CPU."""
        key = (name, like.device, like.dtype)
        if key not in self._factors:
            while like.device.type == "cpu" and len(self._factors) >= _MOST_HELD:
                del self._factors[next(iter(self._factors))]
            kept = [one.to(like) for one in self._lowranks(name)]
            self._factors[key] = side_by_side(kept, self.weights)
        return self._factors[key]

    def chunk(self, unit: Unit, begin: int, block: Block, out: Tensor) -> None:
        """Read a chunk: the weighted sum of all priors."""
        for number, (opened, weight) in enumerate(zip(self.priors, self.weights, strict=True)):
            target = out if number == 0 else torch.empty_like(out)
            _read_unit(opened, unit, block, target)
            if weight != 1.0:
                target.mul_(weight)
            if number:
                out.add_(target)

    @property
    def is_stored(self) -> bool:
        """Whether what `chunk` gives lies in files; products and controls are computed."""
        deltas = (opened.deltas for opened in self.priors)
        return all(isinstance(one, Deltas) and not one.has_factors for one in deltas)

    def stored(self, unit: Unit) -> list[Stored]:
        """The whole tensor that a unit's delta lies in, of every prior; only if `is_stored`."""
        found = []
        for opened, weight in zip(self.priors, self.weights, strict=True):
            assert isinstance(opened.deltas, Deltas)
            found.append(Stored(*opened.deltas.stored(unit.name), weight))
        return found

    def direct(self, unit: Unit, region: Region) -> Direct | None:
        """The region on the map, where one prior holds it in one piece."""
        begin, origin, cols = run_of(unit, region), unit.origin, matrix_shape(unit.shape)[1]
        is_turned = origin.is_transposed or origin.step != 1
        if begin is None or is_turned or self.weights != (1.0,) or not self.is_stored:
            return None
        (stored,) = self.stored(unit)
        if stored.values.shape[1] != cols:
            return None
        first = origin.row * cols + begin
        elements = stored.values.reshape(-1)[first : first + prod(region_shape(unit, region))]
        return Direct(elements, stored.scales, first, cols)

    def rows(self, unit: Unit, first: int, end: int) -> Tensor:
        """Rows [first, end) of a unit's matrix, float32, shape (end - first, cols)."""
        cols = matrix_shape(unit.shape)[1]
        out = torch.empty((end - first) * cols)
        parts = self.factors(unit, Block(first, end - first, 0, cols), out)
        if parts is not None:
            return product(parts, out.view(-1, cols))
        self.chunk(unit, first * cols, Block(first, end - first, 0, cols), out)
        return out.view(-1, cols)


def _read_unit(opened: OpenPrior, unit: Unit, block: Block, out: Tensor) -> None:
    """Read a block of a unit, which may be stored transposed or between other rows."""
    place, target = unit.origin.span(block), out.view(block.rows, block.cols)
    if not unit.origin.is_transposed and unit.origin.step == 1:
        read_delta(opened, unit.name, place, target)
        return
    stored = torch.empty(place.rows, place.cols, dtype=out.dtype)
    read_delta(opened, unit.name, place, stored)
    target.copy_(unit.origin.pick(stored))

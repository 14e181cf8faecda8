"""The bytes of a unit's delta as they travel to a device: as stored, and expanded there.

A packing lays the parts of a region one after the other: of every prior its elements in the order
of the flattened region, in the dtype of the file, and behind them the float32 scales where they
are codes. 16 bits or 8 travel, never 32, and a device gives the values that a CPU gives.

Shapes: a buffer is flat, uint8.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from drift_merge.maths.compression import decompress_rows, widen
from drift_merge.names.tensors import matrix_shape
from drift_merge.training.deltas.files import Direct, FileDeltas, Stored
from drift_merge.training.units import Block, Region, Unit, blocks_of, region_shape, run_of

ALIGNMENT = 256  # bytes; where every part begins, so that any dtype can be seen there
_PASS = 2**22  # elements that one reader copies at once
Regions = Mapping[Unit, Region]


@dataclass(frozen=True, slots=True)
class Part:
    """What one prior holds of a region."""

    dtype: torch.dtype  # as stored
    weight: float  # of the prior
    begin: int  # first byte in the buffer
    numel: int
    scales_begin: int  # first byte of the scales
    num_scales: int  # 0: values, not codes
    is_by_column: bool  # a scale for each column of the unit, which is stored transposed

    def elements(self, buffer: Tensor) -> Tensor:
        """The elements of the region, flat, in the stored dtype."""
        end = self.begin + self.numel * self.dtype.itemsize
        return buffer[self.begin : end].view(self.dtype)

    def scales(self, buffer: Tensor) -> Tensor:
        """Scales of the rows (or columns) of the whole unit, float32."""
        end = self.scales_begin + 4 * self.num_scales
        return buffer[self.scales_begin : end].view(torch.float32)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the parts of a region lie in its buffer."""

    parts: tuple[Part, ...]
    size_bytes: int

    def expand(self, buffer: Tensor, begin: int, block: Block, out: Tensor) -> None:
        """Write a chunk of delta to `out`, as `DeltaSource.chunk` does."""
        for number, part in enumerate(self.parts):
            target = out if number == 0 else torch.empty_like(out)
            _expand(part, buffer, begin, block, target)
            if part.weight != 1.0:
                target.mul_(part.weight)
            if number:
                out.add_(target)

    def direct(self, buffer: Tensor, unit: Unit, region: Region) -> Direct | None:
        """The region for kernels, as `DeltaSource.direct` gives it."""
        part, begin = self.parts[0], run_of(unit, region)
        if len(self.parts) > 1 or part.weight != 1.0 or (part.num_scales and begin is None):
            return None
        scales = part.scales(buffer) if part.num_scales else None
        cols = matrix_shape(unit.shape)[1]
        return Direct(part.elements(buffer), scales, begin or 0, cols, part.is_by_column)

    def rows(self, buffer: Tensor, unit: Unit, first: int, end: int) -> Tensor:
        """Rows of the matrix of a unit that is held whole, as `DeltaSource.rows` gives them."""
        cols = matrix_shape(unit.shape)[1]
        part, block = self.parts[0], Block(first, end - first, 0, cols)
        if len(self.parts) == 1 and part.weight == 1.0 and not part.num_scales:
            return part.elements(buffer)[first * cols : end * cols].view(-1, cols)
        out = torch.empty(block.numel, device=buffer.device)
        self.expand(buffer, first * cols, block, out)
        return out.view(-1, cols)


def _expand(part: Part, buffer: Tensor, begin: int, block: Block, out: Tensor) -> None:
    elements = part.elements(buffer)[begin : begin + block.numel]
    if not part.num_scales:
        widen(elements, out)
        return
    codes, target = (t.view(block.rows, block.cols) for t in (elements, out))
    scales = part.scales(buffer)
    if part.is_by_column:
        inside = scales[block.col : block.col + block.cols]
        target.copy_(decompress_rows(codes.T.contiguous(), inside).T)
        return
    decompress_rows(codes, scales[block.row : block.row + block.rows], target)


def numel_of(unit: Unit, region: Region) -> int:
    """Number of elements of a region."""
    return prod(region_shape(unit, region))


def plain_packing(numel: int, dtype: torch.dtype) -> Packing:
    """The packing of values that are computed, not stored."""
    size = _aligned(numel * dtype.itemsize)
    return Packing((Part(dtype, 1.0, 0, numel, size, 0, False),), size)


class Packs(Protocol):
    """Gives deltas packed, to be sent elsewhere."""

    def packing(self, unit: Unit, region: Region) -> Packing:
        """How a region is packed."""

    def pack(
        self, unit: Unit, region: Region, out: Tensor, readers: Executor | None = None
    ) -> None:
        """Copy the bytes of a region to host memory.

        Args:
            unit: whose delta.
            region: of it.
            out: flat, uint8, as many bytes as its packing has at least.
            readers: threads that copy parts of it side by side; None: this one does it.
        """


class PackedFiles:
    """The deltas of priors, packed from their files."""

    def __init__(self, files: FileDeltas) -> None:
        self._files = files

    def packing(self, unit: Unit, region: Region) -> Packing:
        """How a region is packed."""
        parts, at, numel = [], 0, numel_of(unit, region)
        rows, cols = matrix_shape(unit.shape)
        for stored in self._files.stored(unit):
            dtype, by_column = stored.values.dtype, unit.origin.is_transposed
            count = 0 if stored.scales is None else cols if by_column else rows
            after = at + _aligned(numel * dtype.itemsize)
            parts.append(Part(dtype, stored.weight, at, numel, after, count, by_column))
            at = after + _aligned(4 * count)
        return Packing(tuple(parts), at)

    def pack(
        self, unit: Unit, region: Region, out: Tensor, readers: Executor | None = None
    ) -> None:
        """Copy the bytes of a region to host memory, as `Packs.pack` says."""
        packing, stored = self.packing(unit, region), self._files.stored(unit)
        for part, one in zip(packing.parts, stored, strict=True):
            if one.scales is not None:
                part.scales(out).copy_(_unit_scales(unit, one.scales))
        begin, jobs = 0, []
        for block in blocks_of(unit, region, _PASS):
            work = partial(_pack_block, stored, unit, packing, begin, block, out)
            if readers is None:
                work()
            else:
                jobs.append(readers.submit(work))
            begin += block.numel
        for job in jobs:
            job.result()


class PackedValues:
    """Deltas that lie in no file, products and controls: made on the host, packed in float32."""

    def __init__(self, files: FileDeltas) -> None:
        self._files = files

    def packing(self, unit: Unit, region: Region) -> Packing:
        """How a region is packed."""
        return plain_packing(numel_of(unit, region), torch.float32)

    def pack(
        self, unit: Unit, region: Region, out: Tensor, readers: Executor | None = None
    ) -> None:
        """Write the values of a region to host memory, as `Packs.pack` says."""
        values, begin = self.packing(unit, region).parts[0].elements(out), 0
        for block in blocks_of(unit, region, _PASS):
            self._files.chunk(unit, begin, block, values[begin : begin + block.numel])
            begin += block.numel


def packs_of(files: FileDeltas) -> Packs:
    """What packs the deltas of priors, or of a control."""
    return PackedFiles(files) if files.is_stored else PackedValues(files)


def _pack_block(
    stored: Sequence[Stored], unit: Unit, packing: Packing, begin: int, block: Block, out: Tensor
) -> None:
    place = unit.origin.span(block)
    for part, one in zip(packing.parts, stored, strict=True):
        inside = one.values[place.row : place.row + place.rows, place.col : place.col + place.cols]
        target = part.elements(out)[begin : begin + block.numel].view(block.rows, block.cols)
        target.copy_(unit.origin.pick(inside))


def _unit_scales(unit: Unit, scales: Tensor) -> Tensor:
    """Of the scales of the stored rows those of the unit's rows, or columns."""
    rows, cols = matrix_shape(unit.shape)
    whole = unit.origin.span(Block(0, rows, 0, cols))
    found = scales[whole.row : whole.row + whole.rows]
    return found if unit.origin.is_transposed else found[:: unit.origin.step]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

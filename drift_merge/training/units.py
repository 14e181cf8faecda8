"""Which elements of a live parameter belong to which delta, as plain data.

Shapes: a tensor is seen as a matrix, see `names.tensors.matrix_shape`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.nn import Parameter

from drift_merge.names.tensors import Shape, matrix_shape


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of a unit's matrix view."""

    row: int
    rows: int
    col: int
    cols: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the elements of a unit lie in the prior's tensor, seen as a matrix.

    Element (i, j) of the unit is element (row + i * step, col + j) of the stored delta, or
    (row + j, col + i) if it is stored transposed.
    """

    row: int
    col: int
    is_transposed: bool
    step: int = 1  # rows of the stored delta from one row of the unit to the next

    def span(self, block: Block) -> Block:
        """The block of the stored matrix that holds a block of the unit."""
        if self.is_transposed:
            return Block(self.row + block.col, block.cols, self.col + block.row, block.rows)
        rows = (block.rows - 1) * self.step + 1
        return Block(self.row + block.row * self.step, rows, self.col + block.col, block.cols)

    def pick(self, stored: Tensor) -> Tensor:
        """The block of the unit within its `span`, both as matrices."""
        return stored.T if self.is_transposed else stored[:: self.step]


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A contiguous range of whole rows of one live parameter, and its delta.

    Several units may share a `name` (a prior that fuses what the model splits, heads that
    interleave): they share one coefficient, since a coefficient belongs to the prior's tensor.
    """

    name: str  # canonical name in the prior
    parameter_name: str  # as model.named_parameters() gives it
    parameter: Parameter | None  # None for an adapted weight that is packed (GPTQ)
    module: str  # attn, mlp, mixer, norm, embed, head, other
    layer: int | None
    shape: Shape  # of the unit; that of the parameter where it is the whole of it
    begin: int  # first element in the flattened full parameter
    origin: Origin
    is_adapted: bool = False  # a base weight that PEFT trains through factors; see `lora`

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a unit that this rank holds; exactly one of both fields is set."""

    slices: tuple[slice, ...] | None = None  # rectangular block of the unit's shape (DTensor)
    flat: tuple[int, int] | None = None  # [begin, end) of the flattened unit (ZeRO)


def region_shape(unit: Unit, region: Region) -> Shape:
    """The shape of the local tensor of a region."""
    if region.flat is not None:
        return (region.flat[1] - region.flat[0],)
    assert region.slices is not None
    bounds = (s.indices(n) for s, n in zip(region.slices, unit.shape, strict=True))
    return tuple(max(0, stop - start) for start, stop, _ in bounds)


def run_of(unit: Unit, region: Region) -> int | None:
    """The first element of a region in the flattened unit, where it is one run of elements."""
    if region.flat is not None:
        return region.flat[0]
    assert region.slices is not None
    bounds = [s.indices(n)[:2] for s, n in zip(region.slices, unit.shape, strict=True)]
    if any(bound != (0, n) for bound, n in zip(bounds[1:], unit.shape[1:], strict=True)):
        return None
    return bounds[0][0] * prod(unit.shape[1:]) if bounds else 0


def blocks_of(unit: Unit, region: Region, elements: int) -> Iterator[Block]:
    """Cut a region into rectangles of at most `elements` (or one row), in its flattened order.

    The cuts depend on unit and region alone, so that sums are reproducible.
    """
    for block in _rectangles(unit, region):
        if block.rows == 1:
            for col in range(block.col, block.col + block.cols, elements):
                yield Block(block.row, 1, col, min(elements, block.col + block.cols - col))
            continue
        rows = max(1, elements // block.cols)
        for row in range(block.row, block.row + block.rows, rows):
            yield Block(row, min(rows, block.row + block.rows - row), block.col, block.cols)


def _rectangles(unit: Unit, region: Region) -> Iterator[Block]:
    if 0 in region_shape(unit, region):
        return
    if region.flat is not None:
        yield from _flat_rectangles(*region.flat, matrix_shape(unit.shape)[1])
        return
    assert region.slices is not None
    bounds = [s.indices(n)[:2] for s, n in zip(region.slices, unit.shape, strict=True)]
    col, end = bounds.pop() if len(bounds) > 1 else (0, 1)
    for row, rows in _row_ranges(unit.shape[: len(bounds)], bounds):
        yield Block(row, rows, col, end - col)


def _flat_rectangles(begin: int, end: int, cols: int) -> Iterator[Block]:
    """The rest of a row, whole rows, the start of a row."""
    row, col = divmod(begin, cols)
    if col:
        stop = min(end, (row + 1) * cols)
        yield Block(row, 1, col, stop - begin)
        begin, row = stop, row + 1
    if rows := (end - begin) // cols:
        yield Block(row, rows, 0, cols)
        begin, row = begin + rows * cols, row + rows
    if end > begin:
        yield Block(row, 1, 0, end - begin)


def _row_ranges(shape: Shape, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield (first row, number of rows) of the leading dimensions, as long as they stay whole."""
    if not shape:
        yield 0, 1
        return
    begin, end = bounds[0]
    below = prod(shape[1:])
    if all(bound == (0, size) for bound, size in zip(bounds[1:], shape[1:], strict=True)):
        yield begin * below, (end - begin) * below
        return
    for index in range(begin, end):
        for row, rows in _row_ranges(shape[1:], bounds[1:]):
            yield index * below + row, rows

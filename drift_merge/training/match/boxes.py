"""Where the elements of a tensor come from, while it is stacked, joined, cut and turned.

A `Layout` follows the tensors of the disk through a conversion without touching a value, so that
experts of any size cost nothing. Shapes: S = shape of the target, D its number of dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from drift_merge.names.tensors import Part, Shape, identity_parts, matrix_shape


@dataclass(frozen=True, slots=True)
class Box:
    """A box of the target that one stored tensor fills.

    Element (i, j, ...) of the box is element `offset + i * strides[0] + j * strides[1] + ...` of
    the flat stored tensor.
    """

    name: str  # stored tensor
    start: Shape  # of the box in the target, D numbers
    size: Shape
    offset: int
    strides: Shape


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor as boxes of stored ones that cover it once."""

    shape: Shape
    boxes: tuple[Box, ...]


def whole(name: str, shape: Shape) -> Layout:
    """A stored tensor as it is."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    box = Box(name, (0,) * len(shape), shape, 0, tuple(strides[: len(shape)]))
    return Layout(shape, (box,))


def join(layouts: Sequence[Layout], dim: int) -> Layout:
    """torch.cat. Raises ValueError if the other dimensions differ."""
    boxes, end = [], 0
    for layout in layouts:
        if _put(layout.shape, dim, 0) != _put(layouts[0].shape, dim, 0):
            raise ValueError("tensors of other shapes cannot be joined")
        for box in layout.boxes:
            boxes.append(replace(box, start=_put(box.start, dim, box.start[dim] + end)))
        end += layout.shape[dim]
    return Layout(_put(layouts[0].shape, dim, end), tuple(boxes))


def stack(layouts: Sequence[Layout], dim: int) -> Layout:
    """torch.stack. Raises ValueError as `join`."""
    return join([_insert(layout, dim) for layout in layouts], dim)


def swap(layout: Layout, one: int, other: int) -> Layout:
    """torch.transpose."""

    def turned(values: Shape) -> Shape:
        return _put(_put(values, one, values[other]), other, values[one])

    boxes = (
        Box(b.name, turned(b.start), turned(b.size), b.offset, turned(b.strides))
        for b in layout.boxes
    )
    return Layout(turned(layout.shape), tuple(boxes))


def cut(layout: Layout, dim: int, sizes: Sequence[int]) -> list[Layout]:
    """torch.split. Raises ValueError if the sizes do not add up."""
    if sum(sizes) != layout.shape[dim]:
        raise ValueError(f"{layout.shape[dim]} rows cannot be cut into {list(sizes)}")
    found, begin = [], 0
    for size in sizes:
        boxes = (_clip(box, dim, begin, begin + size) for box in layout.boxes)
        found.append(Layout(_put(layout.shape, dim, size), tuple(b for b in boxes if b)))
        begin += size
    return found


def deal(layout: Layout, dim: int) -> Layout:
    """The even rows of a dimension, then the odd ones: what was interleaved, one after the other.

    Raises ValueError if their number is odd.
    """
    if layout.shape[dim] % 2:
        raise ValueError(f"{layout.shape[dim]} rows are not interleaved in pairs")
    halves = (
        Layout(
            _put(layout.shape, dim, layout.shape[dim] // 2),
            tuple(b for box in layout.boxes if (b := _every_other(box, dim, first))),
        )
        for first in (0, 1)
    )
    return join(tuple(halves), dim)


def parts_of(layout: Layout) -> tuple[Part, ...]:
    """The rectangles of the matrix view, in the order of its rows; few where rows go together."""
    first = layout.boxes[0]
    if len(layout.boxes) == 1 and first == whole(first.name, layout.shape).boxes[0]:
        return identity_parts(first.name, layout.shape)
    found: list[Part] = []
    for part in sorted(
        (p for box in layout.boxes for p in _rectangles(box, layout.shape)), key=_at
    ):
        if found and (joined := _joined(found[-1], part)):
            found[-1] = joined
        else:
            found.append(part)
    return tuple(found)


def _rectangles(box: Box, shape: Shape) -> list[Part]:
    """One for each index of the leading dimensions."""
    rows, cols = matrix_shape(shape)
    if len(shape) < 2:
        stride = box.strides[0] if shape else 1
        start, size = (box.start[0], box.size[0]) if shape else (0, 1)
        return [Part(box.name, start, 0, size, 1, box.offset, stride, 1)]
    found = []
    for index in product(*(range(size) for size in box.size[:-2])):
        row, offset = 0, box.offset
        for i, begin, size, stride in zip(index, box.start, shape, box.strides, strict=False):
            row, offset = row * size + begin + i, offset + i * stride
        row = row * shape[-2] + box.start[-2]
        place = (row, box.start[-1], *box.size[-2:], offset, *box.strides[-2:])
        found.append(Part(box.name, *place))
    assert all(part.row + part.rows <= rows and part.col + part.cols <= cols for part in found)
    return found


def _at(part: Part) -> tuple[int, int]:
    return part.row, part.col


def _joined(one: Part, other: Part) -> Part | None:
    """Two parts as one, where the second goes on with the rows of the first."""
    goes_on = one._replace(
        row=one.row + one.rows,
        rows=other.rows,
        offset=one.offset + one.rows * one.row_stride,
    )
    return one._replace(rows=one.rows + other.rows) if goes_on == other else None


def _every_other(box: Box, dim: int, first: int) -> Box | None:
    """The rows of a box with an even (0) or odd (1) number in the target, numbered anew."""
    skipped = (first - box.start[dim]) % 2
    size = (box.size[dim] - skipped + 1) // 2
    if size < 1:
        return None
    return Box(
        box.name,
        _put(box.start, dim, (box.start[dim] + skipped) // 2),
        _put(box.size, dim, size),
        box.offset + skipped * box.strides[dim],
        _put(box.strides, dim, 2 * box.strides[dim]),
    )


def _put(values: Shape, dim: int, value: int) -> Shape:
    found = list(values)
    found[dim] = value
    return tuple(found)


def _insert(layout: Layout, dim: int) -> Layout:
    """unsqueeze: a dimension of size 1."""

    def wider(values: Shape, value: int) -> Shape:
        return (*values[:dim], value, *values[dim:])

    boxes = (
        Box(b.name, wider(b.start, 0), wider(b.size, 1), b.offset, wider(b.strides, 0))
        for b in layout.boxes
    )
    return Layout(wider(layout.shape, 1), tuple(boxes))


def _clip(box: Box, dim: int, begin: int, end: int) -> Box | None:
    """The part of a box within [begin, end), counted from `begin`."""
    low, high = max(box.start[dim], begin), min(box.start[dim] + box.size[dim], end)
    if low >= high:
        return None
    return replace(
        box,
        start=_put(box.start, dim, low - begin),
        size=_put(box.size, dim, high - low),
        offset=box.offset + (low - box.start[dim]) * box.strides[dim],
    )

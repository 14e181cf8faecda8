"""Deltas of low rank: read block by block from their factors, or worked with as they are.

    delta = U V^T of every matrix of a tensor

Shapes: a tensor is seen as rows of `cols` entries; m, n = rows and columns of a matrix, k = rank.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_merge.maths.spectra.matrices import Matrix


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """The part of one matrix in a block: block[rows, cols] = left @ right.T."""

    rows: slice  # of the block
    cols: slice
    left: Tensor  # (r, k)
    right: Tensor  # (c, k)

    def every(self, step: int) -> "Rectangle":
        """The same of the block's rows 0, step, 2 step, ..., which follow each other then."""
        if step == 1:
            return self
        skipped = -self.rows.start % step
        left = self.left[skipped::step]
        begin = (self.rows.start + skipped) // step
        return Rectangle(slice(begin, begin + len(left)), self.cols, left, self.right)

    def turned(self) -> "Rectangle":
        """The same of the transposed block."""
        return Rectangle(self.cols, self.rows, self.right, self.left)


@dataclass(frozen=True, slots=True)
class _Strip:
    """Adjacent rows of a matrix."""

    begin: int  # rows of the tensor
    end: int
    first_u: int  # row of U at `begin`
    first_v: int  # row of V at the first column
    cols: tuple[int, int, int]


class LowRank:
    """A tensor by the factors of its matrices, which cover each of its entries once."""

    def __init__(self, matrices: Sequence[Matrix], u: Tensor, v: Tensor) -> None:
        """Keep factors: U (sum of m, k) and V (sum of n, k), in the order of the matrices."""
        self.u, self.v = u, v
        strips, first_u, first_v = [], 0, 0
        for matrix in matrices:
            for begin, end in matrix.rows:
                strips.append(_Strip(begin, end, first_u, first_v, matrix.cols))
                first_u += end - begin
            first_v += len(range(*matrix.cols))
        self._strips = sorted(strips, key=lambda s: (s.begin, s.cols[0]))
        self._ends = [strip.end for strip in self._strips]
        self._matrices = tuple(matrices)

    def to(self, like: Tensor) -> "LowRank":
        """The same with factors in the dtype and on the device of a tensor."""
        return LowRank(self._matrices, self.u.to(like), self.v.to(like))

    def rectangles(self, rows: tuple[int, int], cols: tuple[int, int]) -> Iterator[Rectangle]:
        """The matrices' parts in a block of the tensor, factors as they are stored.

        Args:
            rows: first row and the end.
            cols: first column and the end.
        """
        for strip in self._strips[bisect_right(self._ends, rows[0]) :]:
            begin, end = max(strip.begin, rows[0]), min(strip.end, rows[1])
            if strip.begin >= rows[1]:
                return
            first, last, step = strip.cols
            skipped = max(0, -(-(cols[0] - first) // step))  # columns of the matrix before `cols`
            width = len(range(first + skipped * step, min(last, cols[1]), step))
            if begin >= end or not width:
                continue
            at = first + skipped * step - cols[0]
            top, left = strip.first_u + begin - strip.begin, strip.first_v + skipped
            yield Rectangle(
                slice(begin - rows[0], end - rows[0]),
                slice(at, at + (width - 1) * step + 1, step),
                self.u[top : top + end - begin],
                self.v[left : left + width],
            )

    def dense(
        self, rows: tuple[int, int], cols: tuple[int, int], out: Tensor | None = None
    ) -> Tensor:
        """A block of the tensor, added up direction by direction.

        Every product and every sum is rounded to float32 in this order, so that all processors
        and devices give the same values; a matrix product adds in an order of its own.

        Args:
            rows: first row and the end.
            cols: first column and the end.
            out: of that many rows and columns, float32 or wider; new memory if None.
        """
        if out is None:
            out = torch.empty(rows[1] - rows[0], cols[1] - cols[0])
        for part in self.rectangles(rows, cols):
            left, right = part.left.float(), part.right.float()
            total = left[:, :1] * right[:, 0]
            for i in range(1, left.shape[1]):
                total.add_(left[:, i : i + 1] * right[:, i])
            out[part.rows, part.cols] = total.to(out)
        return out


def side_by_side(deltas: Sequence[LowRank], weights: Sequence[float]) -> LowRank | None:
    """sum of weight * delta, by the factors of all; None where their matrices lie otherwise.

    Args:
        deltas: of one shape, at least one.
        weights: one each.
    """
    first = deltas[0]
    if any(delta._matrices != first._matrices for delta in deltas[1:]):
        return None
    u = [delta.u * weight for delta, weight in zip(deltas, weights, strict=True)]
    return LowRank(first._matrices, torch.cat(u, 1), torch.cat([d.v for d in deltas], 1))


def inner(block: Tensor, parts: Sequence[Rectangle]) -> Tensor:
    """<block, delta> without delta: sum of left * (block @ right), 0-dim.

    Args:
        block: (r, c), float32 or float64.
        parts: of delta, in the same block; factors in the dtype and on the device of `block`.
    """
    sums = [torch.sum((block[p.rows, p.cols] @ p.right) * p.left) for p in parts]
    return torch.stack(sums).sum() if sums else block.new_zeros(())


def subtract_(block: Tensor, parts: Sequence[Rectangle], coefficient: Tensor) -> Tensor:
    """block -= coefficient * delta, in place; see `inner`.

    Args:
        block: (r, c), float32 or float64.
        parts: of delta.
        coefficient: 0-dim, of the dtype and on the device of `block`.
    """
    for part in parts:
        block[part.rows, part.cols].addmm_(part.left * coefficient, part.right.T, alpha=-1)
    return block


def product(parts: Sequence[Rectangle], out: Tensor) -> Tensor:
    """A block of delta by matrix products, written to `out`; see `LowRank.dense` for exact bytes.

    Args:
        parts: that cover the block, once each or (of several deltas) added up.
        out: (r, c), of the dtype and on the device of the factors.
    """
    out.zero_()
    for part in parts:
        out[part.rows, part.cols].addmm_(part.left, part.right.T)
    return out


def squared(parts: Sequence[Rectangle]) -> Tensor:
    """<delta, delta> of some parts without delta: sum of (L^T L) * (R^T R), 0-dim, float64."""
    pairs = [(p.left.double(), p.right.double()) for p in parts]
    sums = [torch.sum((left.T @ left) * (right.T @ right)) for left, right in pairs]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)

"""Where the matrices of a tensor lie: a fused tensor holds several, experts one each.

Plain data, without torch. A tensor of shape (..., cols) is seen as rows of `cols` entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection, by its rows and columns in the tensor that holds it."""

    rows: tuple[tuple[int, int], ...]  # ranges of rows, from and to, one below the other
    cols: tuple[int, int, int]  # from, to, step
    is_transposed: bool = False  # stored as (inputs, outputs)

    @property
    def span(self) -> tuple[int, int]:
        """First row, and one past the last."""
        return min(a for a, _ in self.rows), max(b for _, b in self.rows)


def whole(shape: Sequence[int]) -> tuple[Matrix, ...]:
    """The matrices of a tensor that is one; none if it is no matrix or empty."""
    if len(shape) < 2 or not prod(shape):
        return ()
    return (Matrix(((0, prod(shape[:-1])),), (0, shape[-1], 1)),)


def groups(matrices: Sequence[Matrix]) -> Iterator[tuple[Matrix, ...]]:
    """The matrices in groups whose rows do not overlap, in the order of the rows.

    Each group can be read, made and written before the next one begins.
    """
    group: list[Matrix] = []
    end = 0
    for matrix in sorted(matrices, key=lambda m: m.span):
        if group and matrix.span[0] >= end:
            yield tuple(group)
            group = []
        group.append(matrix)
        end = max(end, matrix.span[1])
    if group:
        yield tuple(group)

"""A result that needs whole matrices, made one by one as the chunks come to them.

Shapes: m, n = rows and columns of one matrix; a tensor is seen as rows of `cols` entries.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor, sub

from drift_merge.maths.chunks import Chunk, MethodSettings, Read
from drift_merge.maths.masks import mixed_key
from drift_merge.maths.spectra.matrices import Matrix, groups
from drift_merge.maths.spectra.norms import frobenius

Take = Callable[[Chunk], Tensor]  # a chunk of what a matrix is to be gathered of
Gather = Callable[[Take], Tensor]  # the matrix (m, n) of that, fresh, for one walk over its rows
Make = Callable[[Gather, int], Tensor]  # from matrices and a key of its own to the result (m, n)


class NotFinite(Exception):
    """A matrix holds NaN or Inf; it has no directions."""


class ByMatrix:
    """What is made of a tensor's matrices, in the order of its rows; the state of a method.

    It holds the matrices that the current chunk touches, and makes each once.
    """

    def __init__(
        self,
        read: Read,
        settings: MethodSettings,
        make: Make,
        before: Callable[[int, int], None] | None = None,
        ranks: Sequence[float] = (),
    ) -> None:
        """The state of one tensor.

        Args:
            read: walks over it.
            settings: of it; they have matrices.
            make: the result of one matrix.
            before: called with the range of entries that is walked over next.
            ranks: where `make` leaves the stable ranks that it has seen.
        """
        self._read, self._make, self._key = read, make, settings.key
        self._before, self._ranks = before, ranks
        self._cols = settings.shape[-1]
        self._groups = list(groups(settings.matrices))
        self.num_matrices = len(settings.matrices)
        self._squared = 0.0  # of what is made
        self._next = 0  # number of the next group
        self._made: list[tuple[int, int, Tensor]] = []  # first row, end, rows

    def prepare(self, begin: int, end: int) -> None:
        """Make what the entries [begin, end) need, before their chunk is loaded.

        A walk uses the memory of the chunk that is being combined.
        """
        first, last = begin // self._cols, -(-end // self._cols)
        self._made = [made for made in self._made if made[1] > first]
        while self._next < len(self._groups):
            group = self._groups[self._next]
            top = min(matrix.span[0] for matrix in group)
            if top >= last:
                return
            bottom = max(matrix.span[1] for matrix in group)
            rows = self._rows_of(group, top, bottom)
            self._squared += frobenius(rows) ** 2
            self._made.append((top, bottom, rows))
            self._next += 1

    @property
    def norm(self) -> float:
        """The L2 norm of all that was made."""
        return sqrt(self._squared)

    @property
    def stable_rank(self) -> float | None:
        """The least stable rank of the matrices; None where the method does not look."""
        return min(self._ranks, default=None)

    def entries(self, chunk: Chunk) -> Tensor:
        """The result at the entries of a chunk, flat; a view, or scratch."""
        self.prepare(chunk.begin, chunk.end)
        parts = []
        for top, bottom, rows in self._made:
            begin = max(chunk.begin, top * self._cols) - top * self._cols
            end = min(chunk.end, bottom * self._cols) - top * self._cols
            parts.append(rows.view(-1)[begin:end])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows_of(self, group: Sequence[Matrix], top: int, bottom: int) -> Tensor:
        """What is made of the matrices of a group: its rows, (bottom - top, cols)."""
        rows: Tensor | None = None
        last: list[tuple[Take, Tensor]] = []  # what was gathered last, for all of a group at once

        def grid(take: Take) -> Tensor:
            if not last or last[0][0] is not take:
                last[:] = [(take, self._gathered(top, bottom, take))]
            return last[0][1]

        for matrix in group:
            made = self._made_of(matrix, top, grid)
            made = made.T if matrix.is_transposed else made
            if made.shape == (bottom - top, self._cols):
                return made.contiguous()
            if rows is None:
                rows = made.new_zeros(bottom - top, self._cols)
            row, (left, right, step) = 0, matrix.cols
            for a, b in matrix.rows:
                rows[a - top : b - top, left:right:step] = made[row : row + b - a]
                row += b - a
        assert rows is not None
        return rows

    def _made_of(self, matrix: Matrix, top: int, grid: Callable[[Take], Tensor]) -> Tensor:
        """The result of one matrix; NaN where it has none, which the engine then names."""
        left, right, step = matrix.cols
        shape = [sum(b - a for a, b in matrix.rows), len(range(left, right, step))]

        def gather(take: Take) -> Tensor:
            parts = [grid(take)[a - top : b - top, left:right:step] for a, b in matrix.rows]
            found = torch.cat(parts)  # a copy, which may be overwritten
            if not found.isfinite().all():
                raise NotFinite(found)
            return found.T.contiguous() if matrix.is_transposed else found

        try:
            return self._make(gather, mixed_key(self._key, matrix.span[0] * self._cols + left))
        except NotFinite as error:
            found: Tensor = error.args[0]
            shape = shape[::-1] if matrix.is_transposed else shape
            return found.new_full(shape, torch.nan)

    def _gathered(self, top: int, bottom: int, take: Take) -> Tensor:
        """The rows [top, bottom) of what is taken of the chunks."""
        begin, end = top * self._cols, bottom * self._cols
        if self._before is not None:
            self._before(begin, end)
        rows: Tensor | None = None
        for chunk in self._read(within=(begin, end)):
            part = _within(chunk, begin, end)
            if part is None:
                continue
            taken = take(part)
            rows = taken.new_empty(end - begin) if rows is None else rows
            rows[part.begin - begin : part.end - begin] = taken
        assert rows is not None
        return rows.view(-1, self._cols)


def _within(chunk: Chunk, begin: int, end: int) -> Chunk | None:
    """The entries [begin, end) of a chunk, in its memory; None if it has none of them."""
    first, last = max(begin, chunk.begin), min(end, chunk.end)
    if first >= last:
        return None
    mllm, *rest = (t[first - chunk.begin : last - chunk.begin] for t in chunk.models())
    base = rest.pop() if chunk.base is not None else None
    return Chunk(first, chunk.cols, mllm, rest, base)


def tau(number: int) -> Take:
    """theta - base of a model, the mllm's number 0; without a base theta - mllm."""

    def take(chunk: Chunk) -> Tensor:
        origin = chunk.mllm if chunk.base is None else chunk.base
        theta = chunk.models()[number]
        return sub(theta, origin, out=theta) if theta is not origin else theta - origin

    return take


def theta(number: int) -> Take:
    """A model as it is."""
    return lambda chunk: chunk.models()[number]

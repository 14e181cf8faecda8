"""Singular triples of one matrix: the leading ones by block Krylov iteration, or all of them.

    A = U diag(values) V^T,  A V = U diag(values),  A^T U = V diag(values)

Signs, and the order and the mixture of directions of (nearly) equal singular values, are arbitrary:
use products such as U f(values) V^T alone. The bytes are those of one torch thread, which both
functions see to, so that they depend on matrix and key only; another processor or BLAS rounds
otherwise.

Shapes: m, n = rows and columns of A, r = min(m, n), k = rank, b = columns of a block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from drift_merge.maths.masks import mixed_key, uniform

# Of ||A^T u - value v|| in units of the first value, below which a triple counts as found: some
# hundred roundings, well above what the products can reach.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
_SPARE = 3  # directions beyond those asked for: a gap of zero inside the block costs nothing
_ROUNDS, _COLUMNS = 10, 64  # most blocks, and what the space may always hold
_ROWS, _NARROW = 64, 32  # rows of A that stay in a cache, and the widest block that gains by it
_TINY = 1e-12  # in units of about the first value: below it a direction is noise
_STREAM = 1  # of the key; the masks use the first ones of keys of their own


@dataclass(frozen=True, slots=True)
class Factors:
    """Some singular triples of a matrix, the largest first."""

    u: Tensor  # (m, k), orthonormal columns; beside a value that is mere rounding, any column
    values: Tensor  # (k,), not negative, falling
    v: Tensor  # (n, k), orthonormal columns
    error: float = 0.0  # largest ||A^T u - value v|| over the first value; 0 where not iterated

    def product(self, values: Tensor | None = None) -> Tensor:
        """U diag(values) V^T, shape (m, n); with other values (k,) in place of its own."""
        return (self.u * (self.values if values is None else values)) @ self.v.T

    def first(self, rank: int) -> "Factors":
        """The `rank` largest triples; all, if there are fewer."""
        return Factors(self.u[:, :rank], self.values[:rank], self.v[:, :rank], self.error)


def leading(matrix: Tensor, rank: int, key: int) -> Factors:
    """The `rank` largest singular triples.

    A Krylov space of A^T A is grown by blocks of rank + 3 columns from random ones, with
    Rayleigh-Ritz in float64 after every block, until all triples are found to 1e-5 of the first
    value (float64 matrices: 1e-11), or ten blocks (of a narrow block, 64 columns) have been seen;
    `error` says how far it came. Where the spectrum has no gap behind `rank`, as inside noise, the
    sum of the triples holds nearly the most energy that `rank` directions can hold (tests: 99 %),
    but which directions they are is not determined by the matrix. Small matrices, and ranks that
    would fill half of the space, are decomposed whole.

    Args:
        matrix: (m, n), float32 or float64, finite.
        rank: at least 1; at most r triples come back.
        key: 64 bits, of the random start.

    Returns:
        Triples in the dtype and on the device of `matrix`.

    Source: Musco and Musco 2015, "Randomized Block Krylov Methods for Stronger and Faster
    Approximate Singular Value Decomposition", algorithm 2 (arXiv:1504.05477).
    """
    columns = rank + _SPARE
    most = max(_ROUNDS, _COLUMNS // columns) * columns
    if 2 * most >= min(matrix.shape):
        return full(matrix).first(rank)
    if matrix.stride(1) > matrix.stride(0):  # its rows are scattered: those of A^T lie together
        turned = leading(matrix.T, rank, key)
        return Factors(turned.v, turned.values, turned.u, turned.error)
    with one_thread():
        scale = power_of_two(matrix)
        if scale == 0.0:
            return _zeros(matrix, rank)
        return _Krylov(matrix, rank, most, scale).run(key)


def full(matrix: Tensor) -> Factors:
    """All r singular triples, by a thin SVD.

    Args:
        matrix: (m, n), float32 or float64, finite.
    """
    with one_thread():
        u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
        return Factors(u, values, vt.T)


class _Krylov:
    """The growing space: an orthonormal basis Q (n, p), its images A Q and A^T A Q.

    Only the two products with A run in its dtype; all else is float64.
    """

    def __init__(self, matrix: Tensor, rank: int, most: int, scale: float) -> None:
        self._matrix, self._rank, self._scale = matrix, rank, scale
        m, n = matrix.shape
        empty = partial(torch.empty, dtype=torch.float64, device=matrix.device)
        self._basis, self._returns, self._images = empty(n, most), empty(n, most), empty(m, most)
        self._gram = empty(most, most).zero_()  # images^T images

    def run(self, key: int) -> Factors:
        """Grow until the triples are found, or the space is full."""
        n, b = self._matrix.shape[1], self._rank + _SPARE
        start = uniform(mixed_key(key, _STREAM), 0, self._gram.new_empty(n * b))
        block, most = start.view(n, b) - 0.5, self._gram.shape[0]
        tolerance = _TOLERANCE[self._matrix.dtype]
        for end in range(b, most + 1, b):
            self._add(block, end - b, end)
            values, inner = self._ritz(end)
            v = self._basis[:, :end] @ inner
            error = self._error(values, inner, v)
            if error <= tolerance:
                break
            block = self._returns[:, end - b : end]
        u = (self._images[:, :end] @ inner).div_(values.clamp(min=_TINY))
        u, values, v = (t.to(self._matrix.dtype) for t in (u, values * self._scale, v))
        return Factors(u, values, v, error)

    def _add(self, block: Tensor, begin: int, end: int) -> None:
        """Widen the space by a block, made orthonormal to it, twice: once leaves roundings."""
        basis, dtype = self._basis[:, :begin], self._matrix.dtype
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.T @ block))[0]
        narrow = block.to(dtype)
        self._basis[:, begin:end] = narrow
        self._images[:, begin:end], self._returns[:, begin:end] = self._products(narrow)
        self._gram[:end, begin:end] = self._images[:, :end].T @ self._images[:, begin:end]

    def _products(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """A X (m, b) and A^T A X (n, b), in units of the scale.

        On a CPU a narrow block meets some rows of A twice while they are in the cache: memory is
        read once, and that is what it costs.
        """
        matrix, width = self._matrix, block.shape[1]
        m, n = matrix.shape
        rows = _ROWS if width <= _NARROW and matrix.device.type == "cpu" else m
        image, back = matrix.new_empty(m, width), matrix.new_zeros(width, n)
        for begin in range(0, m, rows):
            some = matrix[begin : begin + rows]
            part = torch.mm(some, block).div_(self._scale)
            image[begin : begin + rows] = part
            back.addmm_(part.T, some)  # as rows: A^T Y takes twice as long
        return image, back.div_(self._scale).T

    def _ritz(self, end: int) -> tuple[Tensor, Tensor]:
        """The largest values (k,) of A on the space, falling, and their v's coordinates (p, k)."""
        squares, inner = torch.linalg.eigh(self._gram[:end, :end], UPLO="U")
        rank = self._rank
        return squares.clamp_(min=0.0).sqrt_().flip(0)[:rank], inner.flip(1)[:, :rank]

    def _error(self, values: Tensor, inner: Tensor, v: Tensor) -> float:
        """The largest ||A^T u - value v||, over the first value; eased for values below 1 % of it.

        There the roundings of float32 products, 1e-7 of the first value squared, hide the rest.
        """
        off = (self._returns[:, : len(inner)] @ inner - v * values.square()).norm(dim=0)
        return float((off / values.clamp(min=0.01 * float(values[0]))).max() / values[0])


@contextmanager
def one_thread() -> Iterator[None]:
    """Arithmetic of this thread on one core: more of them would add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def power_of_two(matrix: Tensor) -> float:
    """The power of two at the largest entry, 0.0 for zeros: squares of tiny numbers underflow."""
    low, high = matrix.aminmax()
    largest = torch.maximum(high, -low).double()
    return float(torch.exp2(torch.floor(torch.log2(largest)))) if largest > 0 else 0.0


def _zeros(matrix: Tensor, rank: int) -> Factors:
    eye = partial(torch.eye, dtype=matrix.dtype, device=matrix.device)
    m, n = matrix.shape
    return Factors(eye(m, rank), matrix.new_zeros(rank), eye(n, rank))

"""LoRA and DoRA: a delta projected on the factors of an adapter. Pure formulas on tensors.

With W = W0 + s B A and G the gradient of W, the chain rule gives dB = s G A^T and dA = s B^T G.
Biasing G by -c delta is therefore, exactly,

    dB' = dB - c D_B,   D_B = s delta A^T          (O, R)
    dA' = dA - c D_A,   D_A = s B^T delta          (R, I)

DoRA (arXiv:2402.09353) has W = (m / n) V with V = W0 + s B A and n = |V| by rows, which PEFT and
section 4.3 of the paper hold constant in the backward pass:

    dm' = dm - c D_m,   D_m = <delta, V> / n       (O,), by rows

and (m / n) delta takes delta's place in D_B and D_A.

Shapes: R = rank, I = columns of W, O = its rows. A weight may have several blocks of rows, each
with factors of its own (experts), and delta may cover only some rows (a fused weight).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_merge.maths.lowrank import Rectangle

ReadRows = Callable[[int, int], Tensor]  # rows [first, last) of delta, (rows, I), any float dtype
# The same by factors, in the dtype and on the device of a tensor; None where delta has none.
ReadFactors = Callable[[int, int, Tensor], Sequence[Rectangle] | None]

_CHUNK_ELEMENTS = {"cpu": 2**18}  # of delta in float32; on a CPU what stays in cache
_CHUNK_ELSEWHERE = 2**24


@dataclass(frozen=True, slots=True)
class FactorBlock:
    """Rows of a weight that is W0 + scale * right @ left."""

    first_row: int  # in the weight seen as one matrix
    left: Tensor  # A: (R, I)
    right: Tensor  # B: (O, R)
    into_left: Tensor  # D_A is added here; shape of left
    into_right: Tensor  # D_B is added here; shape of right


@dataclass(frozen=True, slots=True)
class Magnitude:
    """What DoRA adds to a weight of one block."""

    base: Tensor  # W0: (O, I), any float dtype
    values: Tensor  # m: (O,)
    into: Tensor  # D_m is put here: (O,)


def project(
    read_rows: ReadRows,
    rows: range,
    blocks: Sequence[FactorBlock],
    scale: float,
    magnitude: Magnitude | None = None,
    *,
    read_factors: ReadFactors | None = None,
) -> None:
    """Add the directions of all factors to `into_left`, `into_right` and `magnitude.into`.

    Delta is read once, in runs of whole rows, and never held whole. All arithmetic is in the
    dtype of the factors.

    Args:
        read_rows: rows of delta, counted from delta's own first row.
        rows: which rows of the weight delta covers.
        blocks: of the weight, in any order.
        scale: s.
        magnitude: with DoRA; there is one block then, and it begins at row 0.
        read_factors: the same rows by factors, so that delta is not made; unused with DoRA, which
            takes each of its entries.
    """
    for block in blocks:
        low = max(rows.start, block.first_row)
        high = min(rows.stop, block.first_row + block.right.shape[0])
        if read_factors is not None and magnitude is None and low < high:
            parts = read_factors(low - rows.start, high - rows.start, block.left)
            if parts is not None:
                inside = slice(low - block.first_row, high - block.first_row)
                _project_factors(parts, inside, block, scale)
                continue
        for start, stop in _cut(low, high, block.left):
            inside = slice(start - block.first_row, stop - block.first_row)
            delta = read_rows(start - rows.start, stop - rows.start).to(block.left)
            if magnitude is not None:
                delta = _scale_by_magnitude(delta, block, inside, scale, magnitude)
            block.into_right[inside].add_(delta @ block.left.T, alpha=scale)
            block.into_left.add_(block.right[inside].T @ delta, alpha=scale)


def _project_factors(
    parts: Sequence[Rectangle], rows: slice, block: FactorBlock, scale: float
) -> None:
    """D_B += s L (R^T A^T) and D_A += s (B^T L) R^T for every part L R^T of delta."""
    right, into_right = block.right[rows], block.into_right[rows]
    for part in parts:
        narrow = part.right.T @ block.left[:, part.cols].T
        into_right[part.rows].addmm_(part.left, narrow, alpha=scale)
        narrow = right[part.rows].T @ part.left
        block.into_left[:, part.cols].addmm_(narrow, part.right.T, alpha=scale)


def _scale_by_magnitude(
    delta: Tensor, block: FactorBlock, rows: slice, scale: float, magnitude: Magnitude
) -> Tensor:
    """Return (m / n) delta for a run of rows; put their part of D_m."""
    base = magnitude.base[rows].to(block.left)
    v = torch.addmm(base, block.right[rows], block.left, alpha=scale)
    n = torch.linalg.vector_norm(v, dim=1)
    inverse = torch.where(n > 0, 1.0 / n, 0.0)
    magnitude.into[rows] = (delta * v).sum(1) * inverse
    return delta * (magnitude.values[rows].to(block.left) * inverse)[:, None]


def _cut(low: int, high: int, left: Tensor) -> Iterator[tuple[int, int]]:
    elements = _CHUNK_ELEMENTS.get(left.device.type, _CHUNK_ELSEWHERE)
    rows = max(1, elements // max(1, left.shape[1]))
    return ((start, min(start + rows, high)) for start in range(low, high, rows))

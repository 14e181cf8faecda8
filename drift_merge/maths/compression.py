"""Compressed deltas: 8-bit codes with one float32 scale per row, and what they keep of delta.

    scale = max(largest |x| of the row / largest code, 2**-126)
    code  = x / scale, rounded to nearest
    x    ~= code * scale

Symmetric, without an offset: a zero stays zero, and -x has the negated codes of x. int8 uses
[-127, 127]; float8_e4m3fn (arXiv 2209.05433) reaches 448. All arithmetic is float32: maximum,
product, quotient, rounding and conversion are exact or correctly rounded on every device, so
that a CPU and a GPU give the same bytes.

Shapes: R = rows, C = columns (a row is a vector along the last dimension of a tensor).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from torch import Tensor, dot

from drift_merge.maths.differences import cosine_of

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Below it float32 loses bits, and some processors flush to zero: rows of smaller numbers than
# half of it become zeros.
SMALLEST_SCALE = 2.0**-126
# A scale is this much smaller than largest / LARGEST, so that its own rounding can never make
# code * scale larger than the row was, least of all infinite. It moves a code only where x / scale
# is as good as halfway between two.
_SHRINK = 1.0 - 2.0**-22
_PIECE = 2**18  # elements of temporary memory on a CPU, as a chunk of the engine has

# Widening float8 by its own conversion takes 4.5 ns an element on a CPU, by this table 0.9.
_FLOAT8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)


def row_scales(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of every row.

    Args:
        rows: (R, C), float32, C > 0.
        dtype: of the codes, a key of `LARGEST`.

    Returns:
        (R,), float32, at least `SMALLEST_SCALE`; NaN or Inf where the row holds such a value.

    >>> row_scales(torch.tensor([[0.5, -127.0], [0.0, 0.0]]), torch.int8).tolist()
    [0.9999997615814209, 1.1754943508222875e-38]
    """
    # Not vector_norm(inf) nor aminmax: they take ten times as long on a CPU.
    largest = torch.maximum(rows.amax(1), rows.amin(1).neg_())
    # A factor, since a GPU divides by a constant in another way than a CPU does.
    return largest.mul_(_SHRINK / LARGEST[dtype]).clamp_(min=SMALLEST_SCALE)


def compress_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows.

    Args:
        rows: (R, C), float32, C > 0.
        dtype: of the codes, a key of `LARGEST`.

    Returns:
        Codes (R, C) of `dtype` and scales (R,), float32. Where a scale is not finite, the codes
        of its row mean nothing.
    """
    scales = row_scales(rows, dtype)
    codes = torch.empty_like(rows, dtype=dtype)
    limit = LARGEST[dtype]
    for begin, end in _pieces(rows):
        quotient = rows[begin:end] / scales[begin:end, None]
        if dtype == torch.int8:
            quotient.round_()
        codes[begin:end] = quotient.clamp_(-limit, limit)
    return codes, scales


def decompress_rows(codes: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """codes * scales, row by row.

    Args:
        codes: (R, C), int8 or float8_e4m3fn.
        scales: (R,), float32.
        out: (R, C), contiguous, float32 or wider, on any device; new memory beside the codes if
            None.

    Returns:
        (R, C): `out`; every value is rounded to float32, whatever holds it.

    >>> decompress_rows(torch.tensor([[127, -64]], dtype=torch.int8), torch.tensor([0.5]))
    tensor([[ 63.5000, -32.0000]])
    """
    if out is None:
        out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    if out.dtype != torch.float32:
        return out.copy_(decompress_rows(codes, scales))
    codes, scales = codes.to(out.device), scales.to(out.device)  # 8 bits travel, not 32
    for begin, end in _pieces(codes):
        piece = out[begin:end]
        widen(codes[begin:end], piece).mul_(scales[begin:end, None])
    return out


def widen(values: Tensor, out: Tensor) -> Tensor:
    """Copy values of any dtype to `out` of a wider one; float8 on a CPU by a table.

    Args:
        values: any shape.
        out: the same shape; contiguous where `values` is float8.
    """
    if values.dtype != torch.float8_e4m3fn or values.device.type != "cpu":
        return out.copy_(values)
    if out.dtype != torch.float32:
        return out.copy_(values.to(torch.float32))
    flat = out.view(-1)
    codes = values.reshape(-1).view(torch.uint8)
    for begin in range(0, flat.numel(), _PIECE):
        index = codes[begin : begin + _PIECE].to(torch.int32)
        torch.index_select(_FLOAT8, 0, index, out=flat[begin : begin + _PIECE])
    return out


def float8_table() -> Tensor:
    """The values of the 256 codes of float8_e4m3fn, float32, for kernels that look them up."""
    return _FLOAT8


def _pieces(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of whole rows that bound temporary memory; one range on a GPU."""
    count, length = rows.shape
    step = max(1, _PIECE // max(length, 1)) if rows.device.type == "cpu" else max(count, 1)
    return ((begin, min(begin + step, count)) for begin in range(0, count, step))


@dataclass(slots=True)
class StoredSums:
    """How much of delta its stored form keeps: running sums over chunks, float64 across them."""

    exact_squared: float = 0.0  # sum of delta**2
    stored_squared: float = 0.0  # sum of stored**2
    error_squared: float = 0.0  # sum of (stored - delta)**2

    def add(self, exact: Tensor, stored: Tensor) -> None:
        """Fold in a chunk.

        Args:
            exact: one-dimensional, float32.
            stored: the same as it is stored, float32; overwritten.
        """
        self.exact_squared += float(dot(exact, exact))
        self.stored_squared += float(dot(stored, stored))
        error = stored.sub_(exact)
        self.error_squared += float(dot(error, error))

    def summary(self) -> dict[str, float | None]:
        """`norm_stored` (L2) and `cosine_stored`, of delta and its stored form, in [-1, 1].

        The cosine is None where delta is zero, which has no direction; both are None where a sum
        is not finite.
        """
        exact, stored = self.exact_squared, self.stored_squared
        if not isfinite(exact + stored + self.error_squared):
            return {"norm_stored": None, "cosine_stored": None}
        return {"norm_stored": sqrt(stored), "cosine_stored": self._cosine()}

    def _cosine(self) -> float | None:
        exact, stored = sqrt(self.exact_squared), sqrt(self.stored_squared)
        if exact == 0.0:
            return None
        if stored == 0.0:
            return 0.0
        return min(1.0, max(-1.0, cosine_of(exact, stored, self.error_squared)))

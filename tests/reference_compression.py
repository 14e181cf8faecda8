"""Compression once more, naive and in float64: one row, one element at a time.

Written from the definition in the README: a scale per row from its largest magnitude, codes
rounded to nearest, ties to even. Bounds follow from the rounding of float32.
"""

from collections.abc import Sequence

from tests.checkpoints import FLOAT8

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
SMALLEST_SCALE = 2.0**-126
# The scale is shrunk by 2**-22, and rounded twice: the constant and the product.
SCALE_ERROR = 2.0**-22 + 2.0**-23
QUOTIENT_ERROR = 2.0**-24  # relative, of x / scale in float32

_FLOAT8 = sorted({float(value) for value in FLOAT8 if value == value})


def scale(row: Sequence[float], dtype: str) -> float:
    """The exact scale of a row, of which the float32 one may differ by SCALE_ERROR, relative."""
    return max(max(abs(x) for x in row) / LARGEST[dtype], SMALLEST_SCALE)


def distance_to_nearest(quotient: float, dtype: str) -> float:
    """How far the nearest code is from x / scale."""
    if dtype == "int8":
        nearest = max(-127.0, min(127.0, float(round(quotient))))
        return abs(nearest - quotient)
    return min(abs(value - quotient) for value in _FLOAT8)


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """cos(one, other) in float64, by exact sums."""
    from math import fsum, sqrt

    norms = sqrt(fsum(x * x for x in one)) * sqrt(fsum(y * y for y in other))
    return fsum(x * y for x, y in zip(one, other, strict=True)) / norms

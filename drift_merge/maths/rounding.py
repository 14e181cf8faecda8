"""Stochastic rounding: up or down by chance, so that what is too small for the dtype survives.

    P(upper neighbor) = (x - lower) / (upper - lower), so that the mean over all draws is x

To the nearest, bfloat16 swallows every change below half a step of the weight it is added to. The
draw depends on a key and the position alone, as the masks do: equal bytes for any chunks, threads
and devices. A value that the dtype holds exactly is never changed.

Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3
(arXiv:1502.02551).
"""

from math import isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, dot

from drift_merge.maths.masks import mixed_key, uniform

_STREAM = 0


def round_stochastically(values: Tensor, dtype: torch.dtype, key: int, begin: int) -> Tensor:
    """Round a chunk to bfloat16 or float16, unbiased.

    Args:
        values: shape (n,), float32 or float64.
        dtype: of the result; any other than these two is rounded to nearest.
        key: 64 bits, of (seed, tensor).
        begin: position of the first value in its tensor.

    Returns:
        New tensor, shape (n,), of `dtype`. NaN and Inf stay; what is beyond the largest number
        rounds as to nearest.
    """
    nearest = values.to(dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        return nearest
    error = values - nearest.to(values.dtype)  # exact: the two are near each other
    other = _neighbor(nearest, error)
    gap = (other.to(values.dtype) - nearest.to(values.dtype)).abs_()
    chance = error.abs_().div_(gap)  # 0 where the dtype is exact; NaN where 0 / 0, never chosen
    draw = uniform(mixed_key(key, _STREAM), begin, values.float()).to(values.dtype)
    return torch.where(draw < chance, other, nearest)


def _neighbor(nearest: Tensor, error: Tensor) -> Tensor:
    """The next number of a 16-bit dtype on the side of the error; beside 0 the smallest one."""
    bits = nearest.view(torch.int16)
    magnitude = bits.bitwise_and(0x7FFF)
    is_away = (error > 0) == (nearest > 0)  # from zero: the magnitude grows
    step = torch.where(is_away, 1, -1).to(torch.int16)
    sign = bits.bitwise_and(-0x8000)
    is_zero = magnitude == 0
    sign = torch.where(is_zero & (error < 0), -0x8000, torch.where(is_zero, 0, sign))
    magnitude = torch.where(is_zero, 1, magnitude + step)
    return sign.bitwise_or(magnitude).to(torch.int16).view(nearest.dtype)


class Kept(NamedTuple):
    """What rounding has kept of a change, and what it has added."""

    fraction: float  # along the change; weight times this is the weight that the output has
    error: float  # standard error of `fraction`, of stochastic rounding
    noise: float  # |rounded - exact| / |change|


def change_kept(before: Tensor, exact: Tensor, rounded: Tensor) -> Kept | None:
    """The fraction of a change that rounding has kept, along the change itself.

    fraction = <rounded - before, exact - before> / ||exact - before||^2

    Args:
        before: one-dimensional chunk of the mllm.
        exact: the merged chunk before rounding, same dtype and length.
        rounded: the merged chunk as it is stored, any floating dtype.

    Returns:
        A fraction of 1.0 where nothing is lost; None where there was no change to keep, or it holds
        NaN or Inf.
    """
    change = exact - before
    norm_squared = float(dot(change, change))
    if not norm_squared > 0.0:
        return None
    wide = rounded.to(before)
    fraction = float(dot(wide - before, change)) / norm_squared
    if not isfinite(fraction):
        return None
    residual = wide - exact
    weighted = residual * change
    error = sqrt(float(dot(weighted, weighted))) / norm_squared
    return Kept(fraction, error, sqrt(float(dot(residual, residual)) / norm_squared))

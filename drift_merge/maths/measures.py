"""What is measured of a tensor while it streams by: a sample, NaN and Inf."""

from math import isfinite

import torch
from torch import Tensor

SAMPLE = 8  # values of a tensor; all, if it has fewer


def positions(numel: int) -> list[int]:
    """Flat positions of the sample: evenly spaced, first and last element included.

    >>> positions(15)
    [0, 2, 4, 6, 8, 10, 12, 14]
    """
    if numel <= SAMPLE:
        return list(range(numel))
    return [i * (numel - 1) // (SAMPLE - 1) for i in range(SAMPLE)]


class Sampler:
    """Takes the sample of one tensor from its chunks, for the manifest of a prior.

    Training compares it with the live model where its dtype is another than the stored one, so
    that a fingerprint of bytes says nothing.
    """

    def __init__(self, numel: int) -> None:
        self._positions = positions(numel)
        self.values: list[float | None] = []  # None for NaN and Inf

    def add(self, begin: int, chunk: Tensor) -> None:
        """Take from elements [begin, begin + len) of the tensor, flat; chunks come in order."""
        end = begin + chunk.numel()
        for position in self._positions[len(self.values) :]:
            if position >= end:
                break
            value = float(chunk[position - begin])
            self.values.append(value if isfinite(value) else None)


def count_nonfinite(chunk: Tensor) -> int:
    """Number of NaN and Inf. The sum is finite unless there are any (or it overflows)."""
    if chunk.dtype.itemsize == 1:
        chunk = chunk.float()  # float8 has no arithmetic of its own
    # A float16 sum overflows at 65,504; bfloat16 has the range of float32 and adds up faster.
    dtype = torch.float32 if chunk.dtype == torch.float16 else chunk.dtype
    if isfinite(float(chunk.sum(dtype=dtype))):
        return 0
    return chunk.numel() - int(torch.isfinite(chunk).sum())

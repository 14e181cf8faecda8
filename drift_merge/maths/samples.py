"""A few values of each mllm tensor, kept in the manifest of a prior.

Training compares them with the live model where its dtype is another than the stored one, so
that a fingerprint of bytes says nothing.
"""

from math import isfinite

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
    """Takes the sample of one tensor from its chunks."""

    def __init__(self, numel: int) -> None:
        self._positions = positions(numel)
        self.values: list[float | None] = []  # None for NaN and Inf

    def look(self, begin: int, chunk: Tensor) -> None:
        """See elements [begin, begin + len) of the tensor, flat; chunks come in order."""
        end = begin + chunk.numel()
        for position in self._positions[len(self.values) :]:
            if position >= end:
                break
            value = float(chunk[position - begin])
            self.values.append(value if isfinite(value) else None)

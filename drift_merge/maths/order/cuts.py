"""Tells the k largest entries of a stream from the others, chunk by chunk, once found.

Shapes: one-dimensional chunks; n = entries of one.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import inf

import torch
from torch import Tensor


@dataclass(slots=True)
class Cut:
    """The k largest of a stream: entries above `value`, and the first few equal to it.

    Entries equal to `value` belong to the set before position `ties_from`; from there on only
    `ties_left` of them. Asked for chunk by chunk in order, it counts `ties_left` down.
    """

    value: float  # -1.0: every entry; inf: none
    ties_from: int = 0
    ties_left: int = 0

    def segments(self, magnitudes: Tensor, begin: int) -> list[tuple[slice, float]]:
        """Slices of the chunk at `begin` with a bound each: in the set is what is above it.

        Args:
            magnitudes: shape (n,), of either sign; looked at only where the last kept tie may lie.
            begin: position of its first entry.
        """
        numel = magnitudes.numel()
        every, equal_too = slice(0, numel), self._below(magnitudes)
        if self.value < 0.0 or begin + numel <= self.ties_from:
            return [(every, equal_too)]
        if not self.ties_left and begin >= self.ties_from:
            return [(every, self.value)]
        first = max(0, self.ties_from - begin)
        last = first
        if self.ties_left:
            ties = (magnitudes[first:].abs() == self.value).nonzero()
            taken = min(self.ties_left, len(ties))
            last = numel if len(ties) < self.ties_left else first + int(ties[taken - 1]) + 1
            self.ties_left -= taken
        return [(slice(0, last), equal_too), (slice(last, numel), self.value)]

    def mask(self, magnitudes: Tensor, begin: int) -> Tensor:
        """1.0 in the set, 0.0 outside; shape and dtype of `magnitudes`, a new tensor."""
        kept = torch.empty_like(magnitudes)
        for part, bound in self.segments(magnitudes, begin):
            torch.gt(magnitudes[part], bound, out=kept[part])
        return kept

    def _below(self, like: Tensor) -> float:
        """The bound that lets entries equal to `value` through."""
        return next_number(self.value, like.dtype, up=False) if self.value > 0.0 else -1.0


@lru_cache(maxsize=1024)  # asked for the same few numbers on every chunk
def next_number(value: float, dtype: torch.dtype, *, up: bool) -> float:
    """The next number of a dtype above or below."""
    toward = torch.tensor(inf if up else -inf, dtype=dtype)
    return float(torch.nextafter(torch.tensor(value, dtype=dtype), toward))

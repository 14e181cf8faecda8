"""Values picked from a stream chunk by chunk, packed into a few blocks of memory.

Kept as one small tensor a chunk, among temporary tensors of a megabyte each, they would pin the
heap: it grew by a megabyte a chunk.

Shapes: one-dimensional values.
"""

import torch
from torch import Tensor

_BLOCK = 2**18  # values


class Collected:
    """A bag of values of one dtype on one device."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._filled: list[int] = []  # values in each block

    def add(self, values: Tensor) -> Tensor:
        """Copy values into the bag; returns them as they lie there, shape (n,)."""
        size = values.numel()
        if not self._blocks or self._filled[-1] + size > self._blocks[-1].numel():
            self._blocks.append(values.new_empty(max(_BLOCK, size)))
            self._filled.append(0)
        begin, end = self._filled[-1], self._filled[-1] + size
        self._filled[-1] = end
        return self._blocks[-1][begin:end].copy_(values)

    def parts(self) -> list[Tensor]:
        """All values, without a copy."""
        pairs = zip(self._blocks, self._filled, strict=True)
        return [block[:size] for block, size in pairs if size]

    def __len__(self) -> int:
        return sum(self._filled)


def joined(parts: list[Tensor]) -> Tensor:
    """Some tensors as one; without a copy where there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)

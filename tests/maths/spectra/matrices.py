"""Matrices with a known spectrum."""

from collections.abc import Sequence

import torch
from torch import Tensor


def with_values(shape: tuple[int, int], values: Sequence[float], seed: int) -> Tensor:
    """A float32 matrix (m, n) whose singular values are these, and 0 beyond them."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64))[0]
        for side in shape
    )
    return ((left * torch.tensor(values, dtype=torch.float64)) @ right.T).float()

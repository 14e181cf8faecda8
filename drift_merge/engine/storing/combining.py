"""Adds up deltas chunk by chunk, and measures the sum."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from drift_merge.storage.measured import TensorRecord


class Combination:
    """sum of coefficient * delta, over chunks of any length."""

    def __init__(self, coefficients: Sequence[float]) -> None:
        self._coefficients = coefficients
        self._square, self._largest = 0.0, 0.0
        self._num_zero, self._numel = 0, 0

    def add_up(self, deltas: list[Tensor]) -> Tensor:
        """The sum over one chunk, in the memory of the first."""
        total, *others = deltas
        total.mul_(self._coefficients[0])
        for delta, coefficient in zip(others, self._coefficients[1:], strict=True):
            total.add_(delta, alpha=coefficient)
        if total.numel():
            self._square += float(torch.linalg.vector_norm(total, dtype=torch.float64)) ** 2
            self._largest = max(self._largest, float(total.abs().max()))
            self._num_zero += int((total == 0).sum())
            self._numel += total.numel()
        return total

    def summary(self) -> TensorRecord:
        """Norm, largest entry and share of zeros of what was added up."""
        return TensorRecord(
            norm_delta=sqrt(self._square),
            max_abs_delta=self._largest,
            equal=self._num_zero / self._numel if self._numel else None,
        )

"""What a kernel works on: a contiguous run of a gradient, and the stored delta that lies beside it.

Shapes: n = elements of a run.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drift_merge.training.deltas.files import Direct

GRADIENTS = (torch.float32, torch.bfloat16)
DELTAS = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A gradient and its delta."""

    slot: int
    gradient: Tensor  # (n,), contiguous, any of GRADIENTS; written to
    delta: Direct
    whole: Tensor  # the gradient in its own shape, for its layout

    @property
    def numel(self) -> int:
        """Elements."""
        return self.gradient.numel()


class Kernels(Protocol):
    """Both passes over any number of runs. Equal inputs give equal bits, however often."""

    name: str

    def sums(self, runs: list[Run], into: Tensor) -> None:
        """Add g*g and g*delta of every run to columns 0 and 1 of its slot.

        Args:
            runs: in the order of their slots, on one device.
            into: (P, columns), float64, on the device of the gradients.
        """

    def bias(self, runs: list[Run], coefficients: Tensor) -> None:
        """Subtract coefficient * delta from every gradient; float32, rounded once at the end.

        Args:
            runs: as they were given to `sums`.
            coefficients: (P,), float64, on the device of the gradients.
        """


def can_take(gradient: Tensor, delta: Tensor) -> bool:
    """Whether kernels know these dtypes."""
    return gradient.dtype in GRADIENTS and delta.dtype in DELTAS

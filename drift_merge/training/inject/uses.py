"""What a rule uses of a delta at each step, where that is not the stored one.

    unopposed   m * delta with m = [g * delta < 0]: where descent by g moves along delta
    remaining   theta_reasoner - theta_t = delta + theta_0 - theta_t

Its norm is another at every step and is measured with the other sums.
"""

from dataclasses import dataclass

from torch import Tensor

from drift_merge.training.deltas.beginning import Beginning
from drift_merge.training.options import REMAINING, STORED, UNOPPOSED


@dataclass(slots=True)
class DeltaUse:
    """How the pieces of one injector use delta."""

    kind: str = STORED  # one of STORED, UNOPPOSED, REMAINING
    is_placed: bool = False  # the sum of theta * delta is needed at every step
    beginning: Beginning | None = None  # theta_0, for REMAINING

    @property
    def is_stored(self) -> bool:
        """Whether delta is the same at every step."""
        return self.kind == STORED

    @property
    def needs_weights(self) -> bool:
        """Whether the rule uses delta by where the weights are."""
        return self.kind == REMAINING

    def keep_unopposed(self, gradient: Tensor, delta: Tensor) -> None:
        """Set entries of delta to 0, in place, unless the rule takes all.

        Args:
            gradient: any shape; scaled or not.
            delta: the same shape.
        """
        if self.kind == UNOPPOSED:
            # By signs: a product of two small numbers may underflow to 0.
            delta.mul_(gradient.sign().mul_(delta) < 0)

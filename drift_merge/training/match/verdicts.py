"""What follows from a comparison of the live weights with the prior's: errors and warnings."""

import warnings
from collections.abc import Sequence
from typing import TypedDict

from drift_merge.errors import VerificationError
from drift_merge.training.match.weights import Comparison

_FEW = 3


class Strictness(TypedDict):
    """What to do about other weights."""

    is_strict: bool  # refuse; otherwise warn
    command: str  # how to compute a prior for the live weights, for the message


def require_weights(found: Comparison, *, is_strict: bool, command: str) -> None:
    """Refuse other weights than the prior's; say where the match is one of rounded weights.

    Raises:
        VerificationError: naming the first tensors that differ.
    """
    if found.wrong:
        _refuse(found.wrong, found.total, command, is_strict=is_strict)
    elif found.rounded:
        text = ", ".join(f"{count:,} in {dtype}" for dtype, count in found.rounded.items())
        warnings.warn(
            f"the weights match the prior's within the rounding of a narrower dtype: they were"
            f" loaded in 16 bits and widened ({text}, of {found.total:,} tensors).",
            stacklevel=5,
        )


def require_moved(found: Comparison, steps: int, *, is_strict: bool, command: str) -> None:
    """Refuse a resumed run whose weights are still those of its beginning.

    Raises:
        VerificationError: no tensor differs from the mllm of the prior.
    """
    if found.moved or not found.total:
        return
    message = (
        f"this run resumes after {steps:,} steps, but all {found.total:,} tensors are still those"
        " of the mllm that it began with: the weights of the checkpoint were not loaded."
    )
    remedy = (
        "Load them before the first step, e.g. from_pretrained(CHECKPOINT). If the steps so far"
        " changed nothing (learning rate 0), pass strict=False."
    )
    if is_strict:
        raise VerificationError(message, remedy=remedy)
    warnings.warn(f"{message} {remedy}", stacklevel=5)


def _refuse(wrong: Sequence[str], total: int, command: str, *, is_strict: bool) -> None:
    more = f"\n  ... {len(wrong) - _FEW:,} more" if len(wrong) > _FEW else ""
    message = (
        f"the model does not have the weights that the prior was computed against:"
        f" {len(wrong):,} of {total:,} tensors differ."
        + "".join(f"\n  {text}" for text in wrong[:_FEW])
        + more
    )
    if is_strict:
        raise VerificationError(
            message,
            remedy="Attach before the first training step; to go on with a run, pass its state:"
            " attach(..., state=...). For other weights compute a prior of their own:\n"
            f"{command}\nOr pass strict=False to train with this one.",
        )
    warnings.warn(message, stacklevel=4)

"""How much of a small change survives rounding to the output dtype.

bfloat16 keeps 8 bits: a change below half of the last one vanishes, above it is doubled or so.
A merge of close relatives at weight 0.1 can lose most of itself, and nothing looks wrong.
"""

from math import isfinite

from torch import Tensor, dot


def change_kept(before: Tensor, exact: Tensor, rounded: Tensor) -> float | None:
    """The fraction of a change that rounding has kept, along the change itself.

    kept = <rounded - before, exact - before> / ||exact - before||^2, so that weight times kept
    is the weight that the rounded output really has.

    Args:
        before: one-dimensional chunk of the mllm.
        exact: the merged chunk before rounding, same dtype and length.
        rounded: the merged chunk as it is stored, any floating dtype.

    Returns:
        1.0 where nothing is lost; None where there was no change to keep, or it holds NaN or Inf.
    """
    change = exact - before
    norm_squared = float(dot(change, change))
    if not norm_squared > 0.0:
        return None
    kept = float(dot(rounded.to(before) - before, change)) / norm_squared
    return kept if isfinite(kept) else None

"""NaN and Inf: counted exactly where a cheap sum is suspicious, named, and refused."""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from drift_merge.engine.plan import Plan, Step
from drift_merge.errors import CheckpointError


def count_nonfinite(chunk: Tensor) -> int:
    """Number of NaN and Inf. The sum is finite unless there are any (or it overflows)."""
    if chunk.dtype.itemsize == 1:
        chunk = chunk.float()  # float8 has no arithmetic of its own
    # A float16 sum overflows at 65,504; bfloat16 has the range of float32 and adds up faster.
    dtype = torch.float32 if chunk.dtype == torch.float16 else chunk.dtype
    if isfinite(float(chunk.sum(dtype=dtype))):
        return 0
    return chunk.numel() - int(torch.isfinite(chunk).sum())


def refuse_nonfinite(plan: Plan, step: Step, counts: Mapping[str, int]) -> None:
    """Raise CheckpointError for counted NaN and Inf, unless the recipe allows them."""
    if not counts or plan.recipe.allow_nonfinite:
        return
    found = "; ".join(f"{label}: {n:,} values" for label, n in counts.items())
    raise CheckpointError(
        f"NaN or Inf found while making {step.name}: {found}.",
        remedy="The checkpoint is damaged, or the output dtype is too narrow (--dtype float32). "
        "To keep such values on purpose: --allow-nonfinite",
    )

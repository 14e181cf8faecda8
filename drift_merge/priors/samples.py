"""A few values of each mllm tensor, kept in the manifest.

Training compares them with the live model where its dtype is another than the stored one, so
that a fingerprint of bytes says nothing.
"""

from math import isfinite

from drift_merge.engine.plan import Plan, Step
from drift_merge.storage.mapped import MappedCheckpoint

SAMPLE = 8  # values of a tensor; all, if it has fewer


def positions(numel: int) -> list[int]:
    """Flat positions of the sample: evenly spaced, first and last element included.

    >>> positions(15)
    [0, 2, 4, 6, 8, 10, 12, 14]
    """
    if numel <= SAMPLE:
        return list(range(numel))
    return [i * (numel - 1) // (SAMPLE - 1) for i in range(SAMPLE)]


def sample_mllm(plan: Plan, mapped: MappedCheckpoint, step: Step) -> dict[str, object]:
    """The stored dtype of a step's mllm tensor, and its sample; None for NaN and Inf."""
    import torch  # here: reading a manifest does without

    from drift_merge.engine.workspace import DTYPES

    view = step.inputs[0]
    info = plan.info(view.parts[0], view.source)
    values = []
    if info.numel:
        stored = torch.frombuffer(mapped.view(info), dtype=DTYPES[info.dtype])
        values = [float(stored[position]) for position in positions(info.numel)]
    sample = [value if isfinite(value) else None for value in values]
    return {"dtype_mllm": info.dtype, "sample_mllm": sample}

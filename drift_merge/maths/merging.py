"""Merge formulas: functions from the chunks of the inputs to the chunk of the output.

Knows nothing of files, names or models. Inputs are scratch buffers in the compute dtype
(float32; float64 where an input is) and may be overwritten: the result is one of them.

Shapes: every chunk is one-dimensional, all of equal length.
"""

from collections.abc import Callable, Sequence

from torch import Tensor


def linear(mllm: Tensor, reasoners: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """theta = (1 - sum(w)) * mllm + sum(w_i * reasoner_i), over the chunk `mllm`.

    Computed as mllm + sum(w_i * (reasoner_i - mllm)), the same value, so that equal inputs
    give exactly that input. Overwrites its inputs.

    Args:
        mllm: the chunk of the multimodal model.
        reasoners: one chunk per reasoner.
        weights: w_i, one per reasoner, any finite number; [0, 1] interpolates.

    Returns:
        `mllm`, overwritten.

    Source: model soups, arXiv 2203.05482, eq. 1; for language towers with w = 0.1, "Bring
    Reason to Vision", arXiv 2505.05464.
    """
    for reasoner, weight in zip(reasoners, weights, strict=True):
        if weight == 1.0 and len(weights) == 1:
            return reasoner  # m + (r - m) would round; weight 1 is the reasoner, bit for bit
    differences = [reasoner.sub_(mllm) for reasoner in reasoners]
    for difference, weight in zip(differences, weights, strict=True):
        mllm.add_(difference, alpha=weight)
    return mllm


Combine = Callable[[Tensor, Sequence[Tensor], Sequence[float]], Tensor]

METHODS: dict[str, Combine] = {
    "linear": linear,  # mllm + sum_i w_i * (reasoner_i - mllm)
}

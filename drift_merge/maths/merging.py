"""Merge formulas: functions from the chunks of the inputs to the chunk of the output.

Knows nothing of files, names or models. Inputs are scratch buffers in the compute dtype
(float32; float64 where an input is) and may be overwritten: the result is one of them.

Shapes: every chunk is one-dimensional, all of equal length.
"""

from collections.abc import Sequence

from torch import Tensor, sub


def linear(mllm: Tensor, reasoners: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """theta = (1 - sum(w)) * mllm + sum(w_i * reasoner_i), over the chunk `mllm`.

    Computed as mllm - sum(w_i * (mllm - reasoner_i)), the same value, so that equal inputs
    give exactly that input, down to the sign of zero. Overwrites its inputs.

    Args:
        mllm: the chunk of the multimodal model.
        reasoners: one chunk per reasoner.
        weights: w_i, one per reasoner, any finite number but 0; [0, 1] interpolates.

    Returns:
        The merged chunk, in one of the inputs' memory.

    Source: model soups, arXiv 2203.05482, eq. 1; for language towers with w = 0.1, "Bring
    Reason to Vision", arXiv 2505.05464.
    """
    if list(weights) == [1.0]:
        return reasoners[0]  # m - (m - r) would round; weight 1 is the reasoner, bit for bit
    # Where models agree the difference is +0.0, and -0.0 + 0.0 would be +0.0: the order of each
    # difference is chosen so that what is added to the mllm there is -0.0, which changes nothing.
    differences = [
        sub(mllm, reasoner, out=reasoner) if weight > 0 else reasoner.sub_(mllm)
        for reasoner, weight in zip(reasoners, weights, strict=True)
    ]
    for difference, weight in zip(differences, weights, strict=True):
        mllm.add_(difference, alpha=-abs(weight))
    return mllm

"""FRANK's weights: closed form, one set per layer, from the norms of the task vectors.

    lambda_t = ||tau_t||^2 / sum over all models of ||tau||^2       per layer

for task arithmetic, base + sum(lambda_t * tau_t), the mllm's own task vector among them. The
paper's attention-guided prior (equations 14 to 16) needs images and is not applied.

Source: FRANK, arXiv 2505.16151, section 3.2, equation 13.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from drift_merge.maths.chunks import MethodSettings, Read, blocks
from drift_merge.maths.methods.table import Total


def survey(
    total: Total, numel: Mapping[str, int], settings: MethodSettings
) -> dict[str, tuple[float, ...]]:
    """The weights of every group of tensors: the mllm's first, then the reasoners'."""
    return {group: _shares(sums.tolist()) for group, sums in total(squared_norms).items()}


def squared_norms(read: Read) -> Tensor:
    """||tau_m||^2, ||tau_1||^2, ...: shape (N,), float64; float32 within a block."""
    totals: list[float] = []
    for chunk in blocks(read):
        assert chunk.base is not None
        taus = [theta.sub_(chunk.base) for theta in (chunk.mllm, *chunk.reasoners)]
        found = [float(torch.dot(tau, tau)) for tau in taus]
        totals = [a + b for a, b in zip(totals or [0.0] * len(found), found, strict=True)]
    return torch.tensor(totals, dtype=torch.float64)


def _shares(squared: list[float]) -> tuple[float, ...]:
    total = sum(squared)
    if total == 0.0:
        return tuple(1.0 / len(squared) for _ in squared)  # no model has moved: nothing to share
    return tuple(value / total for value in squared)

"""FRANK's weights: closed form, one set per layer, from the norms of the task vectors.

    lambda_t = ||tau_t||^2 / sum over all models of ||tau||^2                     per layer
    lambda_t = w_t ||tau_t||^2 / sum over all models of w ||tau||^2               with a decay a
    w_m(l) = exp(-a l) / sum_j exp(-a j),  w_r(l) = 1 - w_m(l)                    l, j = 1 ... L

for task arithmetic, base + sum(lambda_t * tau_t), the mllm's own task vector among them. L are the
layers that are merged; what lies outside of them is weighted without a decay. The paper fits a to
attention on images (equation 14), and gives hand-set ones too; ours is given. Over the whole model
at once, without a decay, the weights are those of MetaGPT.

Source: FRANK, arXiv 2505.16151, section 3.2, equations 13, 15 and 16; MetaGPT, arXiv 2406.11385.
"""

from collections.abc import Mapping, Sequence
from math import exp

import torch
from torch import Tensor

from drift_merge.maths.chunks import MethodSettings, Read, blocks
from drift_merge.maths.methods.table import LAYER, Total


def survey(
    total: Total, numel: Mapping[str, int], settings: MethodSettings
) -> dict[str, tuple[float, ...]]:
    """The weights of every group of tensors: the mllm's first, then the reasoners'."""
    priors = _priors(list(numel), settings.numbers["frank_decay"])
    return {
        group: _shares(sums.tolist(), priors.get(group))
        for group, sums in total(squared_norms).items()
    }


def _priors(groups: Sequence[str], decay: float) -> dict[str, float]:
    """w_m of every group that is a layer; none without a decay."""
    layers = {g: int(g.rpartition(" ")[2]) + 1 for g in groups if g.startswith(LAYER)}
    if not decay or not layers:
        return {}
    first = min(layers.values())  # a common factor, which keeps deep layers from underflowing
    parts = {group: exp(-decay * (layer - first)) for group, layer in layers.items()}
    return {group: part / sum(parts.values()) for group, part in parts.items()}


def squared_norms(read: Read) -> Tensor:
    """||tau_m||^2, ||tau_1||^2, ...: shape (N,), float64; float32 within a block."""
    totals: list[float] = []
    for chunk in blocks(read):
        assert chunk.base is not None
        taus = [theta.sub_(chunk.base) for theta in (chunk.mllm, *chunk.reasoners)]
        found = [float(torch.dot(tau, tau)) for tau in taus]
        totals = [a + b for a, b in zip(totals or [0.0] * len(found), found, strict=True)]
    return torch.tensor(totals, dtype=torch.float64)


def _shares(squared: list[float], prior: float | None) -> tuple[float, ...]:
    if prior is not None:
        squared = [prior * squared[0], *((1.0 - prior) * value for value in squared[1:])]
    total = sum(squared)
    if total == 0.0:
        return tuple(1.0 / len(squared) for _ in squared)  # no model has moved: nothing to share
    return tuple(value / total for value in squared)

"""Methods that tell entries by how many models have changed them: RAM, RAM+, MagMax.

Task vectors are those of `taus`, with the opposite sign.

Shapes: n = entries of a chunk, N = merged models: the mllm first, then the reasoners.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drift_merge.maths.chunks import Chunk, MethodSettings, Read
from drift_merge.maths.methods.table import Total
from drift_merge.maths.methods.taus import magnitudes, negated_deltas, piecewise, restored


@piecewise
def ram(chunk: Chunk, state: Sequence[float] | None, settings: MethodSettings) -> Tensor:
    """tau = tau_i where one model alone has changed an entry, the mean where several have.

    A model has changed an entry where |tau_i| > threshold. With a state, as RAM+, what one model
    alone has changed is multiplied by that model's factor.

    Source: Reinforced Agent Merging, arXiv:2601.13572, section on RAM and RAM+.
    """
    nus, threshold = negated_deltas(chunk), settings.numbers["threshold"]
    changed = [nu.abs().gt_(threshold) for nu in nus]
    counts = torch.stack(changed).sum(0)
    alone = counts == 1
    merged = torch.zeros_like(nus[0])
    for nu, own, factor in zip(nus, changed, state or [1.0] * len(nus), strict=True):
        own = nu.mul_(own)
        merged.add_(torch.where(alone, own * factor, own))
    return restored(chunk, merged.div_(counts.clamp_(min=1.0)), settings)


def measure_ram_plus(read: Read, settings: MethodSettings) -> list[float]:
    """The factors of RAM+ from the counts of one tensor."""
    return _factors(_counted(read, settings), settings)


def survey(
    total: Total, numel: Mapping[str, int], settings: MethodSettings
) -> dict[str, list[float]]:
    """The factors of RAM+ from the counts over the whole model."""
    found = total(lambda read: _counted(read, settings))
    return {group: _factors(counts, settings) for group, counts in found.items()}


def _counted(read: Read, settings: MethodSettings) -> Tensor:
    totals = torch.zeros(2, 1 + len(settings.weights), dtype=torch.int64)
    for chunk in read():
        totals += _counts(chunk, settings).cpu()
    return totals


def _counts(chunk: Chunk, settings: MethodSettings) -> Tensor:
    """Entries that each model shares with another, and those it alone has changed: (2, N)."""
    changed = torch.stack([m > settings.numbers["threshold"] for m in magnitudes(chunk)])
    alone = changed.sum(0) == 1
    return torch.stack([(changed & ~alone).sum(1), (changed & alone).sum(1)])


def _factors(counts: Tensor, settings: MethodSettings) -> list[float]:
    """lambda_i = 1 + boost clip(shared_i / unique_i, 0, max_overlap)."""
    boost, most = settings.numbers["boost"], settings.numbers["max_overlap"]
    shared, unique = counts.tolist()
    ratios = [
        a / max(b, settings.numbers["threshold"]) for a, b in zip(shared, unique, strict=True)
    ]
    return [1.0 + boost * min(ratio, most) for ratio in ratios]


@piecewise
def magmax(chunk: Chunk, state: None, settings: MethodSettings) -> Tensor:
    """tau = the tau_i of largest magnitude, entry by entry; of equal ones the last model's.

    Source: MagMax, Marczak et al. 2024, section 4 (arXiv:2407.06322).
    """
    first, *others = negated_deltas(chunk)
    for other in others:
        first = torch.where(other.abs() >= first.abs(), other, first)
    return restored(chunk, first, settings)

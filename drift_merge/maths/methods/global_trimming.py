"""TIES' trimming over the whole model (`--trim global`): one threshold per model, not per tensor.

Two walks over all tensors come before the merge. Both count the 32-bit patterns of |tau|, whose
order is that of the numbers: first the upper half of the pattern, then, within the one upper half
that holds the wanted rank, the lower half. Counts of tensors are simply added, in any order.

Shapes: N = merged models: the mllm first, then the reasoners.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from drift_merge.maths.chunks import MethodSettings, Read
from drift_merge.maths.methods.table import Total
from drift_merge.maths.methods.taus import magnitudes
from drift_merge.maths.methods.trimming import Trims, kept_count
from drift_merge.maths.order.cuts import Cut

_UPPER, _LOWER = 2**15, 2**16  # bins: the sign is 0, so 31 bits of pattern are 15 + 16


@dataclass(frozen=True, slots=True)
class ModelPosition:
    """The bin of the first histogram that holds the wanted rank."""

    upper: int  # the bin
    rank: int  # the wanted rank inside of it, counted from 1 for the largest


def survey(total: Total, numel: Mapping[str, int], settings: MethodSettings) -> dict[str, Trims]:
    """The thresholds of all tensors alike, which stand for the state that `ties` measures itself.

    Args:
        total: sums counts over all tensors.
        numel: entries of the one group that they all are.
        settings: of any of them.
    """
    [(group, entries)] = numel.items()
    rank = wanted(entries, settings)
    if rank == 0:
        return {group: given([float("nan")] * (1 + len(settings.weights)))}
    upper = total(lambda read: upper_counts(read, settings))[group]
    places = [locate(counts, rank) for counts in upper]
    lower = total(lambda read: lower_counts(read, settings, places))[group]
    return {group: given([threshold(*found) for found in zip(places, lower, strict=True)])}


def upper_counts(read: Read, settings: MethodSettings) -> Tensor:
    """How many entries of each task vector have each upper half: shape (N, 2**15), int64."""
    counts = torch.zeros(1 + len(settings.weights), _UPPER, dtype=torch.int64)
    for chunk in read():
        for row, magnitude in zip(counts, magnitudes(chunk), strict=True):
            found = torch.bincount(_patterns(magnitude).bitwise_right_shift_(16), minlength=_UPPER)
            row.add_(found.to(row.device))
    return counts


def lower_counts(read: Read, settings: MethodSettings, places: Sequence[ModelPosition]) -> Tensor:
    """How many entries in the bin of each model have each lower half: (N, 2**16), int64."""
    counts = torch.zeros(1 + len(settings.weights), _LOWER, dtype=torch.int64)
    for chunk in read():
        for row, magnitude, place in zip(counts, magnitudes(chunk), places, strict=True):
            patterns = _patterns(magnitude)
            inside = patterns[(patterns >> 16) == place.upper].bitwise_and_(_LOWER - 1)
            row.add_(torch.bincount(inside, minlength=_LOWER).to(row.device))
    return counts


def locate(counts: Tensor, rank: int) -> ModelPosition:
    """Where the `rank`-th largest entry is.

    Args:
        counts: shape (bins,), of one model, over all tensors.
        rank: in [1, number of entries].
    """
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, rank))
    above = int(from_above[place - 1]) if place else 0
    return ModelPosition(len(counts) - 1 - place, rank - above)


def threshold(place: ModelPosition, counts: Tensor) -> float:
    """The wanted entry, from the counts of the lower halves in its bin."""
    pattern = (place.upper << 16) + locate(counts, place.rank).upper
    return float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32))


def wanted(numel: int, settings: MethodSettings) -> int:
    """How many of all `numel` entries of a model are kept; 0 for an empty model."""
    return kept_count(numel, settings)


def given(thresholds: Sequence[float]) -> Trims:
    """The state that `ties` takes for thresholds found elsewhere.

    Entries equal to a threshold are all kept, as in the code of the authors of TIES: which of
    them come first has no meaning across tensors. NaN keeps none, 0 all.
    """
    return Trims([Cut(t if t == t else inf, ties_from=2**63, ties_left=0) for t in thresholds])


def _patterns(magnitude: Tensor) -> Tensor:
    """The bits of the numbers in float32, as int32: not negative, and in the same order."""
    return magnitude.float().view(torch.int32)

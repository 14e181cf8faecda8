"""Sums over all tensors of what each rank counted of its own: the same bits as by one process.

Integers are summed by each rank and then over the ranks: the order plays no part. Sums of floats
depend on it, so every rank is given the counts of every tensor, as bits, and folds them in the
order of the plan.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drift_merge.storage.ranks.meeting import Ranks

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


Counts = dict[str, Tensor]


def fold(keys: Sequence[str], groups: Mapping[str, str], found: Mapping[str, Tensor]) -> Counts:
    """Sums by group, in the order of the keys; empty counts say nothing."""
    sums: Counts = {}
    for key in keys:
        counts = found.get(key)
        if counts is not None and counts.numel():
            group = groups[key]
            sums[group] = sums[group] + counts if group in sums else counts
    return sums


def fold_over_ranks(
    ranks: Ranks,
    keys: Sequence[str],
    groups: Mapping[str, str],
    found: Mapping[str, Tensor],
    device: torch.device,
) -> Counts:
    """The same where each rank has found its own keys alone.

    Args:
        ranks: all call it.
        keys: of all ranks, in the order in which floats are summed.
        groups: by key.
        found: of this rank; all of one shape and dtype, or empty.
        device: of the collective.
    """
    if ranks.size == 1:
        return fold(keys, groups, found)
    own = next((counts for counts in found.values() if counts.numel()), None)
    mark = None if own is None else [str(own.dtype).removeprefix("torch."), list(own.shape)]
    known = [each for each in ranks.gather(mark) if each is not None]
    if not known:
        return {}
    dtype, shape = getattr(torch, known[0][0]), tuple(known[0][1])
    if not dtype.is_floating_point:
        names = list(dict.fromkeys(groups[key] for key in keys))
        rows = _exchanged(ranks, names, fold(keys, groups, found), dtype, shape, device)
        return fold(names, {name: name for name in names}, rows)
    return fold(keys, groups, _exchanged(ranks, keys, found, dtype, shape, device))


def _exchanged(
    ranks: Ranks,
    names: Sequence[str],
    found: Mapping[str, Tensor],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> Counts:
    """One row a name, summed over the ranks as integers; of floats only one rank has the name."""
    bits = _BITS.get(dtype, dtype)
    width = torch.Size(shape).numel()
    table = torch.zeros(len(names), width + 1, dtype=bits)
    for row, name in zip(table, names, strict=True):
        counts = found.get(name)
        if counts is not None and counts.numel():
            row[:width] = counts.cpu().contiguous().view(bits).flatten()
            row[width] = 1
    summed = ranks.total(table.to(device)).cpu()
    return {
        name: row[:width].clone().view(dtype).reshape(shape)
        for name, row in zip(names, summed, strict=True)
        if row[width]
    }

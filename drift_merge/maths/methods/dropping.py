"""Methods that keep entries at random: DARE and DELLA.

Masks depend on the key and the position of an entry alone (`masks.py`), with a key of its
own for each model: the mllm is stream 0, reasoner i is stream i + 1.

Shapes: n = entries of a chunk, N = merged models: the mllm first, then the reasoners;
R, C = rows of a chunk and entries of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from drift_merge.maths.chunks import Chunk, MethodSettings, Read, blocks, pieces
from drift_merge.maths.masks import keep_mask, mixed_key, uniform
from drift_merge.maths.methods.taus import negated_deltas, piecewise, restored, weighted_sum
from drift_merge.maths.methods.trimming import elected
from drift_merge.maths.order.ranks import by_rank

_TINY_NORM = 1e-7  # mergekit leaves tensors with a smaller sum of magnitudes as they are

Drop = Callable[
    [list[Tensor], int, MethodSettings], None
]  # N task vectors in place, their position


def drop_at_random(taus: list[Tensor], begin: int, settings: MethodSettings) -> None:
    """Keep each entry with probability `density`; DARE's masks, without the rescaling."""
    density = settings.numbers["density"]
    if density >= 1.0:
        return
    for stream, tau in enumerate(taus):
        tau.mul_(keep_mask(mixed_key(settings.key, stream), begin, density, tau))


def drop_by_rank(taus: list[Tensor], begin: int, settings: MethodSettings) -> None:
    """MagPrune's masks: keep large entries of a row more often than small ones.

    In variant `paper` what is kept is divided by its own probability of being kept.
    """
    if settings.numbers["density"] >= 1.0:
        return
    odds = keep_probabilities(settings).to(taus[0])
    for stream, tau in enumerate(taus):
        odds_here = by_rank(tau.view(-1, settings.row_length).abs(), odds).view(-1)
        chance = uniform(mixed_key(settings.key, stream), begin, tau)
        tau.mul_(torch.lt(chance, odds_here, out=chance))
        if settings.variant == "paper":
            tau.div_(odds_here.clamp_(min=2.0**-24))


def keep_probabilities(settings: MethodSettings) -> Tensor:
    """p of the largest to p of the smallest entry of a row: density + epsilon to density - epsilon.

    Linear in the rank and clipped to [0, 1]; a row of one entry has p = density.
    Shape (row_length,), float64.
    """
    density, epsilon = settings.numbers["density"], settings.numbers["epsilon"]
    if settings.row_length == 1:
        return torch.full((1,), density, dtype=torch.float64)
    ranks = torch.arange(settings.row_length, dtype=torch.float64) / (settings.row_length - 1)
    return (density + epsilon - 2.0 * epsilon * ranks).clamp_(0.0, 1.0)


def measure_dare(read: Read, settings: MethodSettings) -> list[float]:
    """The factor of what is kept, per model: 1 / density, or what restores the L1 norm."""
    density = settings.numbers["density"]
    if density >= 1.0:
        return [1.0] * (1 + len(settings.weights))
    if not settings.flags.get("rescale", True):
        return [1.0] * (1 + len(settings.weights))
    if settings.variant != "mergekit":
        return [1.0 / density if density > 0.0 else 0.0] * (1 + len(settings.weights))
    before, after = [0.0] * (1 + len(settings.weights)), [0.0] * (1 + len(settings.weights))
    for block in blocks(read):
        taus = negated_deltas(block)
        before = _added(before, taus)
        for piece in pieces(block):  # the task vectors lie in the memory of the models
            drop_at_random([piece.mllm, *piece.reasoners], piece.begin, settings)
        after = _added(after, taus)
    return [_ratio(*pair) for pair in zip(before, after, strict=True)]


def measure_della(read: Read, settings: MethodSettings) -> list[float]:
    """The factor of what is kept, per model: 1, or in `mergekit` what restores the L1 norm."""
    count = 1 + len(settings.weights)
    rescales = settings.variant == "mergekit" and settings.flags["rescale"]
    if not rescales or settings.numbers["density"] >= 1.0:
        return [1.0] * count
    sums: list[list[Tensor]] = [[] for _ in range(2 * count)]
    for chunk in read():
        taus = negated_deltas(chunk)
        _keep_row_sums(sums[:count], taus, settings)
        drop_by_rank(taus, chunk.begin, settings)
        _keep_row_sums(sums[count:], taus, settings)
    # The sums of rows do not depend on the chunks, and they are added up in one go.
    totals = [float(torch.cat(parts).double().sum()) if parts else 0.0 for parts in sums]
    return [_ratio(*pair) for pair in zip(totals[:count], totals[count:], strict=True)]


@piecewise
def dare_linear(chunk: Chunk, state: list[float], settings: MethodSettings) -> Tensor:
    """theta = theta_b + scale * sum(w_i m_i tau_i / density), m_i = 1 with probability density.

    DARE, arXiv 2311.03099, section 3.2 (drop with probability p = 1 - density, rescale by
    1 / (1 - p)), merged by task arithmetic as in its section 3.3.

    mergekit: rescales by the quotient of the L1 norms before and after (without `rescale` not at
    all); with `normalize` divides by the sum of the weights. peft: as the paper, in releases
    from 2026-04 on; from 2024-02 until then it did not rescale.
    """
    return restored(chunk, _dropped_sum(chunk, state, settings, drop_at_random), settings)


@piecewise
def dare_ties(chunk: Chunk, state: list[float], settings: MethodSettings) -> Tensor:
    """DARE's masks and rescaling, then the election and disjoint merge of TIES.

    DARE, arXiv 2311.03099, section 3.3, merged by TIES, here without trimming. mergekit: does
    not divide by the sum of the agreeing weights unless `normalize`; peft: divides by the count.
    """
    # One factor for all may come last, since elections do not depend on it: one product, not N.
    common = state[0] if state.count(state[0]) == len(state) else 1.0
    factors = [factor / common for factor in state] if common else [1.0] * len(state)
    taus = _dropped(chunk, factors, settings, drop_at_random)
    return restored(chunk, elected(taus, settings), settings, common)


def della(chunk: Chunk, state: list[float], settings: MethodSettings) -> Tensor:
    """theta = theta_b + scale * tau: MagPrune each row of tau_i, elect signs, average what agrees.

    An entry is kept with a probability p linear in the rank of its magnitude in its row, from
    density - epsilon (smallest) to density + epsilon (largest), and divided by p. A 1-D tensor
    is one row. DELLA-Merging, arXiv 2406.11617, section 3 (drop, elect, fuse). The epsilon of the
    paper and the window of its code are the whole width, 2 * epsilon here and in mergekit; the
    authors' code (declare-lab/della, `rank_magnitude`) has the same ranks, ends and 1 / p.

    mergekit: one factor per tensor, which restores its L1 norm, in the place of 1 / p.
    """
    taus = _dropped(chunk, state, settings, drop_by_rank)
    return restored(chunk, elected(taus, settings), settings)


def della_linear(chunk: Chunk, state: list[float], settings: MethodSettings) -> Tensor:
    """DELLA's masks and rescaling, then the sum of task arithmetic (as mergekit has it)."""
    return restored(chunk, _dropped_sum(chunk, state, settings, drop_by_rank), settings)


def _dropped(
    chunk: Chunk, factors: list[float], settings: MethodSettings, drop: Drop
) -> list[Tensor]:
    taus = negated_deltas(chunk)
    drop(taus, chunk.begin, settings)
    for tau, factor in zip(taus, factors, strict=True):
        if factor != 1.0:
            tau.mul_(factor)
    return taus


def _dropped_sum(
    chunk: Chunk, factors: list[float], settings: MethodSettings, drop: Drop
) -> Tensor:
    """The weighted sum of what is kept; the factors cost nothing, being part of the weights."""
    taus = negated_deltas(chunk)
    drop(taus, chunk.begin, settings)
    return weighted_sum(taus, settings, normalize=settings.flags["normalize"], factors=factors)


def _added(sums: list[float], taus: list[Tensor]) -> list[float]:
    return [total + float(tau.abs().sum()) for total, tau in zip(sums, taus, strict=True)]


def _keep_row_sums(sums: list[list[Tensor]], taus: list[Tensor], settings: MethodSettings) -> None:
    for parts, tau in zip(sums, taus, strict=True):
        parts.append(tau.view(-1, settings.row_length).abs().sum(-1))


def _ratio(before: float, after: float) -> float:
    return 1.0 if before < _TINY_NORM or after < _TINY_NORM else before / after

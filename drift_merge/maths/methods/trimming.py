"""Methods that keep entries by magnitude: TIES and Model Breadcrumbs.

Shapes: n = entries of a chunk, N = merged models: the mllm first, then the reasoners.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_merge.maths.chunks import Chunk, MethodSettings, Read
from drift_merge.maths.methods.signs import RULES, disjoint_merge
from drift_merge.maths.methods.taus import (
    all_weights,
    magnitudes,
    negated_deltas,
    piecewise,
    restored,
    weighted_sum,
)
from drift_merge.maths.order.cuts import Cut
from drift_merge.maths.order.thresholds import largest


@dataclass(slots=True)
class Trims:
    """What is kept of each of N models: the set `kept` less the set `outliers`, if there is one."""

    kept: list[Cut]
    outliers: list[Cut] | None = None


def kept_count(numel: int, settings: MethodSettings) -> int:
    """How many entries TIES keeps of a task vector.

    round(density * numel), at least 1 unless the tensor is empty. Variant `mergekit`:
    int(density * numel), at least 1; `peft`: int(density * numel).
    """
    exact = settings.numbers["density"] * numel
    if settings.variant == "peft":
        return min(int(exact), numel)
    rounded = int(exact) if settings.variant == "mergekit" else round(exact)
    return min(max(1, rounded), numel)


def kept_ranks(numel: int, settings: MethodSettings) -> tuple[int, int]:
    """How many of the largest entries breadcrumbs drops, and how many it keeps after those.

    paper: drops round(gamma * numel), keeps round(density * numel) of the rest, at least 1 unless
    the tensor is empty. mergekit: int() of both; where they do not fit together fewer of the
    largest are dropped, and density >= 1 keeps all.
    """
    gamma, density = settings.numbers["gamma"], settings.numbers["density"]
    if settings.variant == "mergekit":
        kept = min(int(density * numel), numel)
        return (0, numel) if density >= 1.0 else (min(int(gamma * numel), numel - kept), kept)
    dropped = min(round(gamma * numel), max(numel - 1, 0))
    return dropped, min(max(1, round(density * numel)), numel - dropped)


def measure_ties(read: Read, settings: MethodSettings) -> Trims:
    """The threshold of each model: its `kept_count` largest |tau|."""
    count = kept_count(settings.numel, settings)
    cuts = _largest(read, settings, [count])
    return Trims([cut for [cut] in cuts])


def measure_breadcrumbs(read: Read, settings: MethodSettings) -> Trims:
    """Two thresholds of each model, around the ranks that are kept."""
    dropped, kept = kept_ranks(settings.numel, settings)
    cuts = _largest(read, settings, [dropped + kept, dropped])
    return Trims([inner for inner, _ in cuts], [outer for _, outer in cuts])


@piecewise
def ties(chunk: Chunk, state: Trims, settings: MethodSettings) -> Tensor:
    """theta = theta_b + scale * tau: trim, elect signs, average what agrees.

    1. Trim: keep the `density` of each tau_i with the largest magnitude.
    2. Elect: gamma = sgn(sum tau_i), per entry.
    3. Disjoint merge: tau = mean of tau_i over {i: sgn tau_i = gamma}, 0 if there is none.

    TIES-Merging, arXiv 2306.01708, section 3 and algorithm 1; density is its k / 100 = 0.2 and
    scale its lambda = 1. The paper trims over the whole model (`--trim global`); per tensor is
    what its successors do. Ties in magnitude go to the lower position. The paper has no weights:
    without `is_weighted` all are 1; with weights entries are elected on sum(w_i tau_i) and
    averaged by sum(w_i tau_i) / sum(w_i), the paper's for equal weights.

    mergekit: density 1; weighted; an exact tie of signs elects +; without `normalize` no
    division. Ties in magnitude fall as its sort has them, ours to the lower position.
    peft: elects on the unweighted sum, a tie elects +, and divides sum(w_i tau_i) by the count.
    """
    return restored(chunk, elected(_trimmed(chunk, state), settings), settings)


@piecewise
def breadcrumbs(chunk: Chunk, state: Trims, settings: MethodSettings) -> Tensor:
    """theta = theta_b + scale * sum(w_i m_i tau_i), m_i without outliers and small entries.

    m_i drops the `gamma` of tau_i with the largest magnitude and keeps the `density` that
    follows. Model Breadcrumbs, arXiv 2312.06795, section 3; its beta is 1 - gamma - density.

    mergekit: rounds down, and with `normalize` divides by the sum of the weights.
    """
    taus = _trimmed(chunk, state)
    merged = weighted_sum(taus, settings, normalize=settings.flags["normalize"])
    return restored(chunk, merged, settings)


@piecewise
def breadcrumbs_ties(chunk: Chunk, state: Trims, settings: MethodSettings) -> Tensor:
    """Breadcrumbs' masks, then the election and disjoint merge of TIES (as mergekit has it)."""
    return restored(chunk, elected(_trimmed(chunk, state), settings), settings)


def elected(taus: list[Tensor], settings: MethodSettings) -> Tensor:
    """Steps 2 and 3 of TIES on negated task vectors, which are overwritten."""
    weights = all_weights(settings)
    if settings.variant == "paper" and not settings.is_weighted:
        weights = (1.0,) * len(weights)
    normalize = settings.flags.get("normalize", True)
    rule = RULES[settings.variant]
    return disjoint_merge(taus, weights, rule, normalize=normalize, negated=True)


def _largest(read: Read, settings: MethodSettings, counts: Sequence[int]) -> list[list[Cut]]:
    def walk(sample: bool) -> Iterator[tuple[int, list[Tensor]]]:
        for chunk in read(sample=sample):
            yield chunk.begin, magnitudes(chunk)

    return largest(walk, [counts] * (1 + len(settings.weights)), settings.numel)


def _trimmed(chunk: Chunk, state: Trims) -> list[Tensor]:
    """N negated task vectors, 0 where not kept."""
    taus = negated_deltas(chunk)
    outliers: Sequence[Cut | None] = state.outliers or [None] * len(taus)
    return [
        _trim(tau, chunk.begin, kept, outer)
        for tau, kept, outer in zip(taus, state.kept, outliers, strict=True)
    ]


def _trim(tau: Tensor, begin: int, kept: Cut, outliers: Cut | None) -> Tensor:
    if outliers is None:
        return _shrunk(tau, begin, kept, out=tau)
    largest_too = _shrunk(tau, begin, outliers, out=torch.empty_like(tau))
    return _shrunk(tau, begin, kept, out=tau).sub_(largest_too)  # x - x and x - 0: exact


def _shrunk(tau: Tensor, begin: int, cut: Cut, *, out: Tensor) -> Tensor:
    """The entries in a set, 0 elsewhere."""
    for part, bound in cut.segments(tau, begin):
        # x where |x| > bound, else 0: a tenth of the time of torch.where.
        torch.hardshrink(tau[part], bound, out=out[part])
    return out

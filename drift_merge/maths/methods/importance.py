"""Methods that select entries by an importance of their own: SCE and Arcee Fusion.

Shapes: n = entries of a chunk; N = merged models, the mllm first; R, C = rows and row length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_merge.maths.chunks import Chunk, MethodSettings, Read, blocks, pieces
from drift_merge.maths.methods.taus import negated_deltas, piecewise, restored
from drift_merge.maths.order.cuts import Cut
from drift_merge.maths.order.thresholds import largest

_QUARTILES = (0.25, 0.5, 0.75)
_EPS = 1e-8  # added to the probabilities of Arcee Fusion


@dataclass(slots=True)
class SceSelection:
    """What SCE keeps, and the weight of each model."""

    cut: Cut
    weights: list[float]


def measure_sce(read: Read, settings: MethodSettings) -> SceSelection:
    """The threshold of the variance, then the sums of squares of what it keeps."""
    count = 1 + len(settings.weights)
    cut = Cut(-1.0)
    if settings.numbers["density"] < 1.0:

        def walk(sample: bool) -> Iterator[tuple[int, list[Tensor]]]:
            for chunk in read(sample=sample):
                yield chunk.begin, [_variances(chunk)]

        [[cut]] = largest(walk, [[_selected_count(read, settings)]], settings.numel)
    squares = [0.0] * count
    measuring = Cut(cut.value, cut.ties_from, cut.ties_left)  # counts down on its own
    for block in blocks(read):
        for piece in pieces(block):
            taus = _selected(piece, measuring)
            squares = [s + float(torch.dot(t, t)) for s, t in zip(squares, taus, strict=True)]
    return SceSelection(cut, _shares(squares, settings))


@piecewise
def sce(chunk: Chunk, state: SceSelection, settings: MethodSettings) -> Tensor:
    """theta = theta_b + scale * sum(eta_i tau_i) over the entries that agree in sign.

    1. Select: the `density` of entries with the largest variance across the models.
    2. Calculate: eta_i = sum(tau_i^2) / sum_j(sum(tau_j^2)) over the selected entries.
    3. Erase: entries of tau_i whose sign is not that of sum_i(tau_i).

    FuseChat, arXiv 2408.07990, section on SCE (select, calculate, erase); density is its top 10 %.
    Keeps round(density * numel) entries, at least 1. Weights of the user play no part.

    The authors' code (FuseAI, `sce_merging.py`) divides by the sum of the agreeing eta_i, as
    `mergekit` does, and lets step 1 decide about eta_i alone: entries that were not selected are
    merged too. The paper's formula is followed here.

    mergekit (by the authors of SCE): divides by the sum of the agreeing eta_i (at least 1e-6);
    keeps int(density * number of entries whose variance is not 0); a tie of signs elects +; eta_i
    are equal where the mean squares sum to less than 1e-6.
    """
    taus = _selected(chunk, state.cut)
    if settings.variant == "paper":
        merged = _agreeing(taus, state.weights)
    else:
        merged = _agreeing_mean(taus, state.weights)
    return restored(chunk, merged, settings)


def variance(taus: list[Tensor]) -> Tensor:
    """The population variance across the N models, exactly 0 where all are equal."""
    steps = [tau - taus[0] for tau in taus[1:]]
    mean = steps[0].clone()
    for step in steps[1:]:
        mean.add_(step)
    mean.mul_(1.0 / len(taus))
    total = mean * mean  # of the first model, whose step is 0
    for step in steps:
        step.sub_(mean)
        total.addcmul_(step, step)
    return total.mul_(1.0 / len(taus))


def _selected_count(read: Read, settings: MethodSettings) -> int:
    density, numel = settings.numbers["density"], settings.numel
    if settings.variant == "paper":
        return min(max(1, round(density * numel)), numel)
    nonzero = sum(int(_variances(chunk).count_nonzero()) for chunk in read())
    return int(density * nonzero)


def _variances(chunk: Chunk) -> Tensor:
    """The variance of every entry of a chunk, written over the mllm."""
    for piece in pieces(chunk):
        piece.mllm.copy_(variance(negated_deltas(piece)))
    return chunk.mllm


def _selected(chunk: Chunk, cut: Cut) -> list[Tensor]:
    """N negated task vectors, 0 where not selected."""
    taus = negated_deltas(chunk)
    if cut.value < 0.0:
        return taus
    mask = cut.mask(variance(taus), chunk.begin)
    return [tau.mul_(mask) for tau in taus]


def _shares(squares: list[float], settings: MethodSettings) -> list[float]:
    total = sum(squares)
    floor = 1e-6 * settings.numel if settings.variant == "mergekit" else 0.0
    if total <= floor:
        return [1.0 / len(squares)] * len(squares)
    return [square / total for square in squares]


def _agreeing(taus: list[Tensor], weights: list[float]) -> Tensor:
    """sum(eta_i tau_i) over the models with the sign of the unweighted sum."""
    elected = sum(taus[1:], taus[0]).sign_()
    merged = torch.zeros_like(elected)
    for tau, weight in zip(taus, weights, strict=True):
        merged.add_(tau.mul_(elected).clamp_(min=0.0), alpha=weight)
    return merged.mul_(elected)


def _agreeing_mean(taus: list[Tensor], weights: list[float]) -> Tensor:
    """sum(eta_i tau_i) / max(sum(eta_i), 1e-6) over the models with the elected sign."""
    total = sum(taus[1:], taus[0])
    elected = total.gt_(0.0).mul_(2.0).sub_(1.0)  # of negated task vectors: a tie was positive
    merged, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for tau, weight in zip(taus, weights, strict=True):
        tau.mul_(elected).clamp_(min=0.0)
        merged.add_(tau, alpha=weight)
        divisor.add_(tau.sign_(), alpha=weight)
    return merged.div_(divisor.clamp_(min=1e-6)).mul_(elected).add_(0.0)


@dataclass(slots=True)
class Fusion:
    """Arcee Fusion's divergence of each row, and the importance from which on entries change."""

    divergences: Tensor  # shape (rows,), float32
    threshold: float


def measure_fusion(read: Read, settings: MethodSettings) -> Fusion:
    """The divergence of each row, then the quartiles of the importance."""
    width = settings.row_length
    parts = [_divergence(chunk, width) for chunk in read()]
    if not parts:
        return Fusion(torch.empty(0), 0.0)
    divergences = torch.cat(parts)

    def walk(sample: bool) -> Iterator[tuple[int, list[Tensor]]]:
        for chunk in read(sample=sample):
            yield chunk.begin, [_importance(chunk, divergences, width)]

    numel = settings.numel
    ranks = [numel - int(q * (numel - 1)) for q in _QUARTILES]
    [[low, middle, high]] = largest(walk, [ranks], numel, shortcut=False)
    return Fusion(divergences, middle.value + 1.5 * (high.value - low.value))


def arcee_fusion(chunk: Chunk, state: Fusion, settings: MethodSettings) -> Tensor:
    """theta = theta_m + [I >= q2 + 1.5 (q3 - q1)] * (theta_1 - theta_m).

    I = |theta_1 - theta_m| * KL(softmax(theta_1) || softmax(theta_m)), the divergence over each
    row (a 1-D tensor is one row), 1e-8 added to the probabilities, and q1, q2, q3 the
    quartiles of I: entry int(q * (numel - 1)) of its ascending order.

    Arcee Fusion, arcee.ai and mergekit (no paper). The quartiles are exact at every size; mergekit
    samples a million entries at random where there are more. I below 0 (rounding) counts as 0.
    """
    width = settings.row_length
    step = chunk.mllm - chunk.reasoners[0]
    importance = _importance(chunk, state.divergences, width)
    kept = torch.ge(importance, state.threshold, out=torch.empty_like(importance))
    return chunk.mllm.sub_(step.mul_(kept))


def _divergence(chunk: Chunk, width: int) -> Tensor:
    """KL(softmax(reasoner) || softmax(mllm)) of each row."""
    first = chunk.reasoners[0].view(-1, width).softmax(-1).add_(_EPS)
    second = chunk.mllm.view(-1, width).softmax(-1).add_(_EPS)
    return (first / second).log_().mul_(first).sum(-1)


def _importance(chunk: Chunk, divergences: Tensor, width: int) -> Tensor:
    """|theta_1 - theta_m| times the divergence of its row; written over the reasoner."""
    first = chunk.begin // max(width, 1)
    step = chunk.reasoners[0].sub_(chunk.mllm).abs_().view(-1, width)
    rows = divergences[first : first + step.shape[0]].unsqueeze(-1)
    return step.mul_(rows).clamp_(min=0.0).view(-1)

"""Sign election and disjoint merge, the second and third step of TIES (arXiv 2306.01708).

The authors' paper, mergekit and PEFT disagree on what is elected and what is divided by; the
table `RULES` says how. Task vectors may be given negated as long as all are: `negated` turns
the one rule around that is not symmetric, that of an exact tie.

Shapes: one-dimensional task vectors of equal length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, empty_like, eq, minimum, sign


@dataclass(frozen=True, slots=True)
class SignElection:
    """How signs are elected and agreeing entries averaged."""

    elects_weighted: bool  # the sign of sum(w_i tau_i), else that of sum(tau_i)
    zero_is_positive: bool  # an exact tie elects +, else nothing
    divides_by: str  # "count" of agreeing models, or the sum of their "weights"


RULES = {
    # gamma = sgn(sum tau_i), with sgn 0 = 0; the mean over A = {i: sgn tau_i = gamma}. The paper
    # has no weights: with weights it is the weighted mean, which is the mean for equal ones.
    "paper": SignElection(elects_weighted=True, zero_is_positive=False, divides_by="weights"),
    "mergekit": SignElection(elects_weighted=True, zero_is_positive=True, divides_by="weights"),
    "peft": SignElection(elects_weighted=False, zero_is_positive=True, divides_by="count"),
}


def disjoint_merge(
    taus: Sequence[Tensor],
    weights: Sequence[float],
    rule: SignElection,
    *,
    normalize: bool = True,
    negated: bool = False,
) -> Tensor:
    """Elect a sign for each entry and average the task vectors that have it.

    Args:
        taus: one per model, trimmed; overwritten.
        weights: one per model, finite.
        rule: which of the formulas.
        normalize: False leaves out the division.
        negated: the task vectors are given with the opposite sign, and so is the result.

    Returns:
        The merged task vector, written over the first; 0 where no model agrees.

    Source: TIES-Merging, section 3 (steps "elect" and "disjoint merge").
    """
    if rule.elects_weighted:
        for tau, weight in zip(taus, weights, strict=True):
            if weight != 1.0:
                tau.mul_(weight)
    elected = _elect(taus, rule, negated=negated)
    for tau in taus:
        tau.mul_(elected).clamp_(min=0.0)  # |tau| where the signs agree, else 0
    counts = [1.0] * len(taus) if rule.divides_by == "count" else weights
    is_pair = normalize and list(counts) == [1.0, 1.0]
    both = minimum(*taus).sign_() if is_pair else None  # 1.0 where both agree, else 0.0
    divisor = _divisor(taus, counts) if normalize and not is_pair else None
    shares = [1.0] * len(taus) if rule.elects_weighted else weights
    merged = taus[0] if shares[0] == 1.0 else taus[0].mul_(shares[0])
    for tau, share in zip(taus[1:], shares[1:], strict=True):
        merged.add_(tau, alpha=share)
    if both is not None:
        merged.addcmul_(merged, both, value=-0.5)  # half of it: as exact as a division
    if divisor is not None:
        merged.div_(divisor)
    merged.mul_(elected)
    # -0.0 where -1 was elected for nothing; + 0.0 makes it 0.0, so that a base of -0.0 stays.
    return merged.add_(0.0) if rule.zero_is_positive else merged


def _divisor(agreeing: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """The sum of the counts of the models that agree; 1 where that is 0."""
    total = sign(agreeing[0])
    if counts[0] != 1.0:
        total.mul_(counts[0])
    scratch = empty_like(total)
    for tau, count in zip(agreeing[1:], counts[1:], strict=True):
        total.add_(sign(tau, out=scratch), alpha=count)
    return total.add_(eq(total, 0.0, out=scratch))


def _elect(taus: Sequence[Tensor], rule: SignElection, *, negated: bool) -> Tensor:
    """The elected sign per entry: +1.0, -1.0, or 0.0 for a tie that elects nothing."""
    total = taus[0] + taus[1] if len(taus) > 1 else taus[0].clone()
    for tau in taus[2:]:
        total.add_(tau)
    if not rule.zero_is_positive:
        return total.sign_()
    # +1 where the sum of what was not negated is >= 0.
    return total.gt_(0.0).mul_(2.0).sub_(1.0) if negated else total.ge_(0.0).mul_(2.0).sub_(1.0)

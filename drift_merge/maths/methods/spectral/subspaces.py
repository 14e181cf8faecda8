"""Merges of the singular subspaces of task vectors: STAR, TSV-M, Iso-C, Iso-CTS.

Shapes: m, n = rows and columns of a matrix, r = min(m, n), N = merged models.
"""

import torch
from torch import Tensor

from drift_merge.maths.chunks import MethodSettings
from drift_merge.maths.masks import mixed_key
from drift_merge.maths.methods.spectral.leading import step_of
from drift_merge.maths.methods.spectral.sums import Taus, measured
from drift_merge.maths.spectra.leading import Factors, full
from drift_merge.maths.spectra.norms import stable_rank


def _star(taus: Taus, settings: MethodSettings) -> Tensor:
    """tau = mean of the tau_i, each cut to the leading directions and rescaled to its norm.

    The fewest directions are kept whose singular values sum to eta percent of all, and multiplied
    by the sum of all over the sum of the kept.

    Source: STAR, Lee et al. 2025, section 3 (arXiv:2502.10339).
    """
    step = step_of(settings)
    total: Tensor | None = None
    for number, tau in enumerate(taus):
        kept = tau if step is None else step.apply(tau, mixed_key(taus.key, number))
        total = kept if total is None else total.add_(kept)
    assert total is not None
    return total.div_(len(taus))


def _tsv_m(taus: Taus, settings: MethodSettings) -> Tensor:
    """tau = polar([U_1 ... U_N]) diag(S_1 ... S_N) polar([V_1 ... V_N])^T, k = r // N of each.

    A matrix with fewer directions than there are models gets the mean.

    Source: TSV-Merge, Gargiulo et al. 2025, section 3.3 and algorithm 1 (arXiv:2412.00081).
    """
    first = taus[0]
    rank = min(first.shape) // len(taus)
    if rank == 0:
        return taus.total().div_(len(taus))
    parts = [full(first).first(rank)]
    parts += [full(taus[number]).first(rank) for number in range(1, len(taus))]
    joined = _joined(parts)
    return (_polar(joined.u) * joined.values) @ _polar(joined.v).T


def _iso_c(taus: Taus, settings: MethodSettings) -> Tensor:
    """tau = mean(S) U V^T of the sum of the tau_i = U S V^T.

    Source: Iso-C, Marczak et al. 2025, section 4.1 (arXiv:2502.04959).
    """
    found = _seen(full(taus.total()), taus)
    return found.product(found.values.mean().expand_as(found.values))


def _iso_cts(taus: Taus, settings: MethodSettings) -> Tensor:
    """Iso-C over the leading directions of the sum, and those of each tau_i beyond them.

    Of r directions about `common` come from the sum; the others, equally many of each model, from
    tau_i - U_c U_c^T tau_i. All U, and all V, are made orthonormal, all values their mean.

    Source: Iso-CTS, Marczak et al. 2025, section 4.2 (arXiv:2502.04959).
    """
    whole = _seen(full(taus.total()), taus)
    short, count = len(whole.values), len(taus)
    single = short - int(short * settings.numbers["common"])
    own = min(round(single / count), short // count)
    common = whole.first(short - own * count)
    parts = [] if own == 0 else [_beyond(tau, common, own) for tau in taus]
    joined = _joined([*parts, common])
    return (_polar(joined.u) @ _polar(joined.v).T).mul_(joined.values.mean())


def _seen(found: Factors, taus: Taus) -> Factors:
    """Leave the stable rank of the sum behind: every direction beyond it is mostly noise."""
    taus.ranks.append(stable_rank(found, float(found.values.double().norm())))
    return found


def _beyond(tau: Tensor, common: Factors, rank: int) -> Factors:
    """The leading directions of what a task vector has beyond the common left directions."""
    return full(tau.sub_(common.u @ (common.u.T @ tau))).first(rank)


def _joined(parts: list[Factors]) -> Factors:
    return Factors(
        torch.cat([part.u for part in parts], 1),
        torch.cat([part.values for part in parts]),
        torch.cat([part.v for part in parts], 1),
    )


def _polar(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns: U V^T of its decomposition."""
    found = full(columns)
    return found.u @ found.v.T


star = measured(_star)
tsv_m = measured(_tsv_m)
iso_c = measured(_iso_c)
iso_cts = measured(_iso_cts)

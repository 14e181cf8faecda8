"""WUDI's objective in closed form, by the eigenvectors of the Gram matrices of task vectors.

    min over tau of sum_i ||(tau - tau_i) tau_i^T||_F^2 / ||tau_i||_F^2

Shapes: m, n = outputs and inputs of a matrix, N = merged models.
"""

from math import ceil

import torch
from torch import Tensor

from drift_merge.maths.chunks import MethodSettings
from drift_merge.maths.methods.spectral.sums import Taus, measured
from drift_merge.maths.spectra.leading import one_thread
from drift_merge.maths.spectra.norms import frobenius

_FLOOR = 1e-8  # least eigenvalue, as in the authors' code; their sum is the number of models


def _swudi(taus: Taus, settings: MethodSettings) -> Tensor:
    """tau = t0 - t0 Q f Q^T + D Q (f / l) Q^T, C = Q l Q^T.

        C = sum tau_i^T tau_i / ||tau_i||^2,  D = sum tau_i tau_i^T tau_i / ||tau_i||^2
        swudi:  f = 1 - exp(-time l) on the ceil(share n) largest l, 0 on the others
        aswudi: f = 1 on the K = (sum sqrt(l))^2 / sum l largest, 0 on the others

    t0 is the sum of the tau_i. In float64: l is a square of singular values.

    Source: no paper: github.com/WalkerWorldPeace/MLLMerging, May 2026; the objective is WUDI's,
    Cheng et al. 2025, equation 8 (arXiv:2503.08099).
    """
    start = taus.total()
    gram = target = start.new_zeros((), dtype=torch.float64)
    with one_thread():
        for tau in taus:
            norm = frobenius(tau)
            if norm == 0.0:
                continue
            wide = (tau / norm).double()
            inner = wide.T @ wide
            gram = gram + inner
            target = target + wide @ inner * norm
        if gram.ndim == 0:
            return start  # no model has moved
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp_(min=_FLOOR), vectors.flip(1)
        factors = _factors(values, settings)
        wide = start.double()
        merged: Tensor = wide - (wide @ vectors * factors) @ vectors.T
        merged += (target @ vectors * (factors / values)) @ vectors.T
    return merged.to(start.dtype)


def _factors(values: Tensor, settings: MethodSettings) -> Tensor:
    """f of each eigenvalue, falling: how far the closed form replaces the start there."""
    if "share" not in settings.numbers:
        kept = ceil(float(values.sqrt().sum() ** 2 / values.sum()))
        factors = torch.ones_like(values)
    else:
        kept = ceil(settings.numbers["share"] * len(values))
        factors = 1.0 - torch.exp(-settings.numbers["time"] * values)
    factors[kept:] = 0.0
    return factors


swudi = measured(_swudi)

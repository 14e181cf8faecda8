"""Norms of a matrix and of some of its directions, and the factor that makes them agree.

    ||A||_F^2 = sum of values^2 (frobenius),  ||A||_* = sum of values (nuclear)

Shapes: m, n = rows and columns of A, k = directions kept.
"""

import torch
from torch import Tensor

from drift_merge.maths.spectra.leading import Factors, one_thread, power_of_two

NORMS = ("frobenius", "nuclear", "none")
_ROWS = 64


def frobenius(matrix: Tensor) -> float:
    """||A||_F, summed in float64; shape (m, n)."""
    with one_thread():
        scale = power_of_two(matrix)
        if scale == 0.0:
            return 0.0
        # By some rows at a time, which stay in the cache, and so that no square underflows.
        rows = [torch.linalg.vector_norm(b / scale, dim=1) for b in torch.split(matrix, _ROWS)]
        return float(torch.cat(rows).double().norm()) * scale


def nuclear(matrix: Tensor) -> float:
    """||A||_*, the sum of all singular values; costs most of a whole decomposition."""
    with one_thread():
        return float(torch.linalg.svdvals(matrix).sum(dtype=torch.float64))


def matching_factor(
    matrix: Tensor, values: Tensor, norm: str, all_values: Tensor | None = None
) -> float:
    """What the directions kept are to be multiplied by, so that their norm is the matrix's.

        N_k(A) = P_k(A) ||A|| / ||P_k(A)||, P_k(A) = sum of the k leading u value v^T

    Args:
        matrix: (m, n).
        values: (k,), those of its singular values that are kept.
        norm: one of `NORMS`; "none" gives a factor of 1.
        all_values: (r,), if they are known.

    Returns:
        At least 1 but for roundings; 1 where the values are all 0.

    Source: Frobenius: Ji et al. 2026, "Selective-RL", a preprint; nuclear: Lee et al. 2025, STAR,
    section 3 (arXiv:2502.10339).
    """
    if norm == "none":
        return 1.0
    if norm == "frobenius":
        whole, kept = frobenius(matrix), float(values.double().norm())
    else:
        kept = float(values.sum(dtype=torch.float64))
        whole = nuclear(matrix) if all_values is None else float(all_values.double().sum())
    return whole / kept if kept > 0.0 else 1.0


def first_share(factors: Factors, norm: float) -> float:
    """The share of the first direction in the energy: value_1^2 / ||A||_F^2, in [0, 1].

    Args:
        factors: at least one triple.
        norm: ||A||_F. Of a zero matrix the share is 0.
    """
    return min(1.0, (float(factors.values[0]) / norm) ** 2) if norm > 0.0 else 0.0


def stable_rank(factors: Factors, norm: float) -> float:
    """||A||_F^2 / value_1^2: 1 for one direction, up to r for equal values; 0 for a zero matrix."""
    share = first_share(factors, norm)
    return 1.0 / share if share > 0.0 else 0.0

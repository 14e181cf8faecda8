"""The two factors of a delta: delta ~ B A, of a rank or of a share of its energy.

Shapes: m, n = outputs and inputs of a layer, k = rank.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

import drift_merge.engine.workspace  # noqa: F401  (spends torch's warning of read-only maps)
from drift_merge.maths.spectra.leading import Factors, leading
from drift_merge.maths.spectra.norms import frobenius
from drift_merge.storage import fingerprints

_FIRST = 16  # directions looked for first, where their number is not known


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """B and A of a layer, and what they keep of delta."""

    a: Tensor  # (k, n): sqrt(S) V^T
    b: Tensor  # (m, k): U sqrt(S)
    norm: float  # ||delta||
    kept: float  # share of ||delta||^2 that the directions hold, in [0, 1]
    error: float  # ||delta - B A|| / ||delta||, of the factors as they are stored

    @property
    def rank(self) -> int:
        """k."""
        return len(self.a)


def factorize(
    delta: Tensor,
    name: str,
    *,
    rank: int | None,
    energy: float | None,
    max_rank: int | None,
    dtype: torch.dtype,
) -> Pair | None:
    """The leading directions of a delta, their roots on either side; None for zeros.

    Directions that are mere rounding are left out, so that the rank may be lower.

    Args:
        delta: (m, n), float32, finite.
        name: of the layer, keys the random start of the iteration.
        rank: how many; or None.
        energy: share of ||delta||^2, in (0, 1]: as few as hold it; or None.
        max_rank: at most so many.
        dtype: of the factors.
    """
    norm = frobenius(delta)
    if norm == 0.0:
        return None
    scaled = delta / norm  # squares of tiny deltas underflow
    found = _directions(scaled, name, rank, energy, min(*delta.shape, max_rank or delta.numel()))
    roots = found.values.sqrt()
    a = (roots[:, None] * found.v.T * sqrt(norm)).to(dtype).contiguous()
    b = (found.u * roots * sqrt(norm)).to(dtype).contiguous()
    rest = torch.addmm(delta, b.float(), a.float(), alpha=-1)
    kept = float(found.values.double().square().sum())
    return Pair(a, b, norm, min(1.0, kept), frobenius(rest) / norm)


def _directions(
    delta: Tensor, name: str, rank: int | None, energy: float | None, most: int
) -> Factors:
    """Of a delta of norm 1: a number of directions, or as few as hold a share of the energy."""
    key = fingerprints.key_of("lora", name)
    wanted = min(rank or _FIRST, most)
    found = leading(delta, wanted, key)
    while energy is not None and wanted < most and _held(found)[-1] < energy:
        wanted = min(2 * wanted, most)
        found = leading(delta, wanted, key)
    if energy is not None:
        found = found.first(1 + int((_held(found) < energy).sum()))
    noise = float(found.values[0]) * torch.finfo(torch.float32).eps * sqrt(max(delta.shape))
    return found.first(max(1, int((found.values > noise).sum())))


def _held(found: Factors) -> Tensor:
    """The energy of the first direction, of the first two, and so on; float64."""
    return found.values.double().square().cumsum(0)

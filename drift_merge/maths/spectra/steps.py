"""The spectral step on a delta: which of its directions are kept, and how much of each.

    step(A) = rest A + sum of c_i u_i value_i v_i^T

rank K:     c = ||A|| / ||A_K|| for the K leading directions, rest = 0; A_K holds those alone
eta E:      the same for the fewest directions whose values sum to E percent of all
bands:      c by number of the direction, less rest: what the open band, if any, gives the others
gates:      c_i given one by one, rest = 0

Shapes: m, n = rows and columns of A.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from drift_merge.maths.spectra.bands import Band
from drift_merge.maths.spectra.leading import Factors, full, leading
from drift_merge.maths.spectra.norms import matching_factor


@dataclass(frozen=True, slots=True)
class SpectralStep:
    """What becomes of the directions; exactly one of the first four is given."""

    rank: int = 0
    eta: float = 0.0  # percent, in (0, 100]
    bands: tuple[Band, ...] = ()
    gates: Tensor | None = None  # (k,)
    norm: str = "none"  # "frobenius", "nuclear" or "none": of the whole, which rank and eta keep

    def apply(self, delta: Tensor, key: int) -> Tensor:
        """The step on one matrix.

        Args:
            delta: (m, n), finite; overwritten.
            key: 64 bits, of the random start of the iteration.

        Returns:
            A matrix (m, n), perhaps in the memory of `delta`. Rank min(m, n) and more gives
            `delta` itself.
        """
        if self.eta:
            return self._by_share(delta)
        if self.rank:
            return self._by_rank(delta, key)
        if self.gates is not None:
            gates = self.gates.to(delta)
            return _spanned(leading(delta, len(gates), key), gates, delta)
        return self._by_bands(delta, key)

    def _by_rank(self, delta: Tensor, key: int) -> Tensor:
        if self.rank >= min(delta.shape):
            return delta
        found = leading(delta, self.rank, key)
        factor = matching_factor(delta, found.values, self.norm)
        return _spanned(found, torch.full_like(found.values, factor), delta)

    def _by_share(self, delta: Tensor) -> Tensor:
        found = full(delta)
        kept = found.first(rank_of_share(found.values, self.eta))
        factor = matching_factor(delta, kept.values, self.norm, found.values)
        return _spanned(kept, torch.full_like(kept.values, factor), delta)

    def _by_bands(self, delta: Tensor, key: int) -> Tensor:
        short = min(delta.shape)
        rest = next((factor for _, end, factor in self.bands if end is None), 0.0)
        # The open band is what is left of the delta itself: its directions are not looked for.
        rank = max(end if end is not None else begin for begin, end, _ in self.bands)
        if rank == 0:
            return delta.mul_(rest)
        factors = torch.full((min(rank, short),), -rest, dtype=delta.dtype, device=delta.device)
        for begin, end, factor in self.bands:
            factors[begin:end] += factor
        found = leading(delta, len(factors), key)
        factors = factors[: len(found.values)] * found.values
        return delta.mul_(rest).addmm_(found.u * factors, found.v.T)


def rank_of_share(values: Tensor, percent: float) -> int:
    """The fewest leading values that sum to `percent` of all; at least 1.

    Source: STAR, Lee et al. 2025, section 3 (arXiv:2502.10339).
    """
    sums = values.double().cumsum(0)
    rank = int(torch.searchsorted(sums, sums[-1] * percent / 100.0)) + 1
    return min(rank, len(values))


def _spanned(found: Factors, factors: Tensor, out: Tensor) -> Tensor:
    """sum of factor_i u_i value_i v_i^T, written over `out`."""
    return torch.mm(found.u * (found.values * factors), found.v.T, out=out)

"""Histogram of |x| in powers of two, read from the exponents of float32: exact, and cheap."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

NUM_BINS = 256  # of the exponent of float32; bin e holds 2^(e-127) <= |x| < 2^(e-126)
BIAS = 127
_ZERO, _NONFINITE = 0, 255  # bin 0: zero and subnormal numbers; 255: NaN and Inf


@dataclass(slots=True)
class Histogram:
    """Counts by exponent."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(NUM_BINS, dtype=torch.int64))

    def add(self, chunk: Tensor) -> None:
        """Count a flat chunk, any floating dtype."""
        bits = chunk.to(torch.float32).contiguous().view(torch.int32)
        exponents = bits.bitwise_right_shift(23).bitwise_and_(0xFF)
        self.counts += torch.bincount(exponents.cpu(), minlength=NUM_BINS)

    def plain(self) -> dict[str, object]:
        """As plain data: zeros, NaN and Inf, and the bins from the first to the last that counts.

        `bins` are pairs: exponent e and the number of entries with 2^e <= |x| < 2^(e+1).
        """
        counts: list[int] = self.counts.tolist()
        used = [e for e in range(_ZERO + 1, _NONFINITE) if counts[e]]
        span = range(used[0], used[-1] + 1) if used else range(0)
        return {
            "zeros": counts[_ZERO],
            "nonfinite": counts[_NONFINITE],
            "bins": [[e - BIAS, counts[e]] for e in span],
        }

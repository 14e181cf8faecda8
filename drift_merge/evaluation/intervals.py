"""Whether a difference between two models on the same items is more than noise.

Both models answer the same items, so that what is compared is pairs: questions that both get
right, or both wrong, say nothing. Scores of 0 and 1 get McNemar's exact test (McNemar 1947; Fay
2010, Biostatistics 11) and the interval of Agresti and Min (2005, Statistics in Medicine 24); other
scores a bootstrap over items (Efron 1979), percentile interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean

LEVEL = 0.95
_Z = 1.959963984540054  # quantile of the normal distribution at (1 + LEVEL) / 2
RESAMPLES = 10_000
_BLOCK = 2**22  # indices drawn at a time


@dataclass(frozen=True, slots=True)
class Comparison:
    """The mean of one model minus that of another, over the items that both have answered."""

    difference: float  # in the unit of the scores
    low: float  # of the interval at LEVEL
    high: float
    num_items: int  # in both
    num_unpaired: int  # in one of them only; not compared
    test: str  # "mcnemar" or "bootstrap"
    p: float | None = None  # of McNemar's test
    wins: int | None = None  # items that only the first has right, and the other way round
    losses: int | None = None

    @property
    def is_noise(self) -> bool:
        """Whether chance alone explains the difference, at LEVEL."""
        if self.p is not None:
            return self.p > 1.0 - LEVEL
        return self.low <= 0.0 <= self.high


def compare(one: Mapping[str, float], other: Mapping[str, float]) -> Comparison | None:
    """Compare two models by their scores of each item.

    Args:
        one: item -> score.
        other: the same of the model that it is compared with.

    Returns:
        None if they share no item.
    """
    shared = sorted(one.keys() & other.keys())
    if not shared:
        return None
    num_unpaired = len(one.keys() ^ other.keys())
    differences = [one[item] - other[item] for item in shared]
    if all(scores[item] in (0.0, 1.0) for scores in (one, other) for item in shared):
        return _mcnemar(differences, num_unpaired)
    low, high = bootstrap(differences)
    mean = fmean(differences)
    return Comparison(mean, low, high, len(shared), num_unpaired, "bootstrap")


def _mcnemar(differences: Sequence[float], num_unpaired: int) -> Comparison:
    wins = sum(difference > 0 for difference in differences)
    losses = sum(difference < 0 for difference in differences)
    low, high = agresti_min(wins, losses, len(differences))
    return Comparison(
        difference=(wins - losses) / len(differences),
        low=low,
        high=high,
        num_items=len(differences),
        num_unpaired=num_unpaired,
        test="mcnemar",
        p=mcnemar(wins, losses),
        wins=wins,
        losses=losses,
    )


def mcnemar(wins: int, losses: int) -> float:
    """The exact two-sided p: how often a fair coin is as uneven as `wins` to `losses`."""
    total = wins + losses
    tail = sum(comb(total, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**total))


def agresti_min(wins: int, losses: int, num_items: int) -> tuple[float, float]:
    """The interval of (wins - losses) / num_items: Wald's, with half an item added to each cell."""
    b, c, n = wins + 0.5, losses + 0.5, num_items + 2
    middle = (b - c) / n
    reach = _Z * sqrt(b + c - (b - c) ** 2 / n) / n
    return max(-1.0, middle - reach), min(1.0, middle + reach)


def bootstrap(differences: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean: quantiles of the means of RESAMPLES samples with replacement.

    Args:
        differences: one per item.
        seed: of the samples; the same gives the same interval.
    """
    import torch

    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _BLOCK // len(differences))
    means = []
    for begin in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - begin), len(differences))
        drawn = torch.randint(len(differences), shape, generator=generator)
        means.append(values[drawn].mean(1))
    tail = (1 - LEVEL) / 2
    bounds = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    low, high = bounds.tolist()
    return low, high

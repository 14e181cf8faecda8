"""The reasoning prior of one tensor, and what is measured of a pair on the way.

    delta = theta_reasoner - theta_mllm          (DRIFT, arXiv 2510.15050, section 3)
    delta = theta_reasoner - theta_base          (the two-model form: a true task vector)

The order is the point: adding delta to the mllm moves it TOWARDS the reasoner, and descent
along g - alpha * delta does the same. All arithmetic is float32 unless the inputs are float64.

Shapes: S = any shape, the same for all arguments; chunks of a tensor are one-dimensional.
"""

from dataclasses import dataclass
from math import isfinite, sqrt

from torch import Tensor, dot, ne


def delta(reasoner: Tensor, origin: Tensor) -> Tensor:
    """The step from `origin` (the mllm, or the base) to the reasoner: reasoner - origin.

    Args:
        reasoner: shape S, floating point.
        origin: shape S, same dtype.

    Returns:
        New tensor, shape S.

    >>> import torch
    >>> delta(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor([2.])
    """
    return reasoner - origin


def delta_(reasoner: Tensor, origin: Tensor) -> Tensor:
    """`delta`, written over `reasoner`: the streamed form, on scratch buffers only."""
    return reasoner.sub_(origin)


STATISTICS = ("norm_delta", "norm_mllm", "norm_reasoner", "cosine", "max_abs_delta", "equal")


@dataclass(slots=True)
class PairSums:
    """Running sums over the chunks of one pair of tensors; float64 across chunks.

    Within a chunk the sums are float32 (a fused dot product); with at most 2**18 entries a
    chunk the relative error stays below 1e-5.
    """

    has_base: bool = False  # delta = reasoner - base, so the cosine needs a product of its own
    num_filled: int = 0  # entries without a partner, equal because they were filled in
    reasoner_squared: float = 0.0  # sum of theta_reasoner**2
    mllm_squared: float = 0.0  # sum of theta_mllm**2
    product: float = 0.0  # sum of theta_reasoner * theta_mllm; only with a base
    delta_squared: float = 0.0  # sum of delta**2, before rounding to the stored dtype
    delta_max: float = 0.0  # largest |delta|
    num_entries: int = 0
    num_changed: int = 0  # entries of delta that are not exactly 0

    def add_pair(self, reasoner: Tensor, mllm: Tensor) -> None:
        """Fold in a chunk of both models, one-dimensional and of equal length."""
        self.reasoner_squared += float(dot(reasoner, reasoner))
        self.mllm_squared += float(dot(mllm, mllm))
        if self.has_base:
            self.product += float(dot(reasoner, mllm))

    def add_delta(self, chunk: Tensor, scratch: Tensor) -> None:
        """Fold in a chunk of delta, one-dimensional.

        Args:
            chunk: at most 2**24 entries, up to which float32 counts exactly.
            scratch: the same shape and dtype; written over.
        """
        self.delta_squared += float(dot(chunk, chunk))
        # Not vector_norm(inf): it takes 3 ns an element on a CPU, aminmax 0.1.
        low, high = chunk.aminmax()
        self.delta_max = max(self.delta_max, float(high), -float(low))
        # Ones in floats and their sum: 0.2 ns; count_nonzero and booleans take 0.8 and more.
        self.num_changed += int(ne(chunk, 0, out=scratch).sum())
        self.num_entries += chunk.numel()

    @property
    def is_finite(self) -> bool:
        """False when an input may hold NaN or Inf (or a sum of squares overflowed float32)."""
        return isfinite(self.reasoner_squared + self.mllm_squared + self.delta_squared)

    def summary(self) -> dict[str, float | None]:
        """Norms (L2), cosine of the two models in [-1, 1], largest |delta|, share of equal entries.

        All None when the tensor holds NaN or Inf; the share also where no entry has a partner.
        """
        if not self.is_finite:
            return dict.fromkeys(STATISTICS)
        return {
            "norm_delta": sqrt(self.delta_squared),
            "norm_mllm": sqrt(self.mllm_squared),
            "norm_reasoner": sqrt(self.reasoner_squared),
            "cosine": min(1.0, max(-1.0, self._cosine())),
            "max_abs_delta": self.delta_max,
            "equal": self._equal(),
        }

    def _equal(self) -> float | None:
        compared = self.num_entries - self.num_filled
        return (compared - self.num_changed) / compared if compared else None

    def _cosine(self) -> float:
        ours, theirs = sqrt(self.reasoner_squared), sqrt(self.mllm_squared)
        if ours * theirs == 0.0:
            return 0.0
        if self.has_base:
            return self.product / (ours * theirs)
        return cosine_of(ours, theirs, self.delta_squared)


def cosine_of(one: float, other: float, distance_squared: float) -> float:
    """The cosine of two vectors from their norms, not 0, and their squared distance.

    The law of cosines keeps 1 - cos exact for near relatives, where the product, a float32 sum,
    would lose it: their cosines differ from 1 in the sixth digit only.
    """
    return 1.0 - (distance_squared - (one - other) ** 2) / (2.0 * one * other)

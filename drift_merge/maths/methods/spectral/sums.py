"""The result of a method on the matrices of all task vectors, and the plain mean of the others.

    theta = base + scale merge(w_m tau_m, w_1 tau_1, ...) for each matrix
    theta = base + scale mean(w_m tau_m, w_1 tau_1, ...) for vectors, embeddings and convolutions

Shapes: m, n = rows and columns of a matrix, N = merged models, the mllm the first.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from drift_merge.maths.chunks import Chunk, MethodSettings, Read
from drift_merge.maths.methods.spectral.by_matrix import ByMatrix, Gather, tau
from drift_merge.maths.methods.table import Measure
from drift_merge.maths.methods.taus import all_weights, negated_deltas, restored, weighted_sum


class Taus:
    """The weighted task vectors of one matrix, read when they are asked for, one at a time."""

    def __init__(
        self, gather: Gather, settings: MethodSettings, key: int, ranks: list[float]
    ) -> None:
        self._gather, self._weights = gather, all_weights(settings)
        self.key = key  # of this matrix
        self.ranks = ranks  # where a method leaves the stable ranks that it has seen

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        """w tau of a model, (m, n), fresh."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        found = self._gather(tau(number))
        weight = self._weights[number]
        return found if weight == 1.0 else found.mul_(weight)

    def total(self) -> Tensor:
        """The sum over all models."""
        total = self[0]
        for number in range(1, len(self)):
            total.add_(self[number])
        return total


MergeTaus = Callable[[Taus, MethodSettings], Tensor]  # to the merged task vector (m, n)


def measured(merge: MergeTaus) -> Measure:
    """The `measure` of a method whose merged task vectors are made matrix by matrix."""

    def measure(read: Read, settings: MethodSettings) -> ByMatrix | None:
        if not settings.matrices:
            return None
        ranks: list[float] = []

        def make(gather: Gather, key: int) -> Tensor:
            taus = Taus(gather, settings, key, ranks)
            return merge(taus, settings).neg_().add_(0.0)

        return ByMatrix(read, settings, make, ranks=ranks)

    return measure


def on_base(chunk: Chunk, state: ByMatrix | None, settings: MethodSettings) -> Tensor:
    """theta = base + scale tau, with the tau of the matrices, or the mean."""
    if state is not None:
        return restored(chunk, state.entries(chunk), settings)
    nus = negated_deltas(chunk)
    return restored(
        chunk, weighted_sum(nus, settings, normalize=False), settings, factor=1.0 / len(nus)
    )

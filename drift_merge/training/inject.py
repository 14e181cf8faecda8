"""The injection: local sums, one all-reduce per group, coefficients by the rule, g -= c * delta.

Nothing waits for the device: coefficients stay tensors. Without a group the second pass
follows the first while gradient and delta are in the cache.

Shapes: P = number of slots, one for each tensor of the prior.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.maths.injection import Rule, Sums
from drift_merge.training.pieces import COLUMNS, DensePiece, Piece, Scratch, add_cells

_BATCH = 2**20  # elements that are measured and then biased together, if no group is waited for


@dataclass(slots=True)
class Slots:
    """What is known of each slot; every tensor has shape (P,), float64."""

    names: tuple[str, ...]  # canonical names in the prior
    modules: tuple[str, ...]
    alpha: Tensor  # without the schedule's factor
    mllm_norm: Tensor  # |theta_mllm| as the prior recorded it
    delta_sq: Tensor  # sum of delta*delta; 0 where it is measured at each step (LoRA)
    prior_norm: Tensor  # |delta| of the whole tensor; scales mllm_norm where a part is biased
    start: Tensor  # sum of theta*delta when training began


class Injector:
    """Biases the gradients of all pieces once."""

    def __init__(self, pieces: Sequence[Piece], slots: Slots, rule: Rule) -> None:
        self.pieces, self.slots, self.rule = list(pieces), slots, rule
        device = slots.alpha.device
        self.sums = torch.zeros(len(slots.names), COLUMNS, dtype=torch.float64, device=device)
        self.coefficients = torch.zeros(len(slots.names), dtype=torch.float64, device=device)
        self.missing: set[int] = set()  # pieces without a gradient at the last step
        self._scratch = Scratch(device)
        self._groups = _by_group(self.pieces)

    def measure_start(self) -> None:
        """Fill `delta_sq` and `start`; before the first step, and after delta has changed."""
        sums = torch.zeros_like(self.sums)
        for group, pieces in self._groups:
            for piece in pieces:
                if isinstance(piece, DensePiece):
                    add_cells(sums, piece.measure_start(self._scratch))
            _reduce(sums, pieces, group)
        self.slots.delta_sq = sums[:, 2].clone()
        self.slots.start = sums[:, 1].clone()

    def apply(self, factor: float, scale: float | Tensor | None = None) -> int:
        """Bias all gradients.

        Args:
            factor: the schedule's, for this step.
            scale: what gradients are still multiplied with; None for 1.

        Returns:
            The number of pieces with a gradient.
        """
        self.sums.zero_()
        self.missing.clear()
        with torch.no_grad():
            for group, pieces in self._groups:
                for batch in [pieces] if group is not None else _batches(pieces):
                    self._apply(batch, group, factor, scale)
        return len(self.pieces) - len(self.missing)

    def _apply(
        self,
        pieces: Sequence[Piece],
        group: ProcessGroup | None,
        factor: float,
        scale: float | Tensor | None,
    ) -> None:
        for piece in pieces:
            cells = piece.measure(self._scratch)
            if cells is None:
                self.missing.add(id(piece))
            add_cells(self.sums, cells or [])
        _reduce(self.sums, pieces, group)
        rows = _rows(pieces, self.sums.device)
        strength = self._coefficients(rows, factor, scale)
        self.coefficients[rows] = strength
        if scale is not None:
            self.coefficients[rows] *= scale
        for piece in pieces:
            piece.bias(self.coefficients, self._scratch)
        self.coefficients[rows] = strength

    def _coefficients(self, rows: Tensor, factor: float, scale: float | Tensor | None) -> Tensor:
        if scale is not None:
            self.sums[rows, 0] /= scale * scale
            self.sums[rows, 1] /= scale
        delta_norm = (self.slots.delta_sq[rows] + self.sums[rows, 2]).sqrt()
        sums = Sums(
            grad_sq=self.sums[rows, 0],
            dot=self.sums[rows, 1],
            delta_norm=delta_norm,
            mllm_norm=self.slots.mllm_norm[rows],
        )
        return self.rule(sums) * self.slots.alpha[rows] * factor


def _by_group(pieces: Sequence[Piece]) -> list[tuple[ProcessGroup | None, list[Piece]]]:
    groups: dict[int, tuple[ProcessGroup | None, list[Piece]]] = {}
    for piece in pieces:
        group = piece.group
        groups.setdefault(id(group), (group, []))[1].append(piece)
    return list(groups.values())


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces of whole slots, of about `_BATCH` elements together."""
    batch: list[Piece] = []
    size = 0
    for piece in sorted(pieces, key=lambda piece: piece.slot):
        if size >= _BATCH and piece.slot != batch[-1].slot:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.numel
    if batch:
        yield batch


def _rows(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    return torch.tensor(sorted({piece.slot for piece in pieces}), device=device)


def _reduce(sums: Tensor, pieces: Sequence[Piece], group: ProcessGroup | None) -> None:
    """Add up the rows of these pieces over the ranks of a group."""
    if group is None:
        return
    rows = _rows(pieces, sums.device)
    local = sums[rows]
    torch.distributed.all_reduce(local, group=group)
    sums[rows] = local

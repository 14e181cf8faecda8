"""Adds what pieces have measured to the sums of their slots, in a fixed order."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from drift_merge.training.inject.pieces import COLUMNS, Cell

_MOST_INDICES = 10_000  # that are kept; gradients that come and go (experts) make ever new ones


class ScatterAdd:
    """Adds 0-dim values to rows and columns of sums, many at once and in a fixed order."""

    def __init__(self) -> None:
        # Where the cells of a batch go is the same at every step; to send it to a device each
        # time would wait for the host.
        self._index: dict[tuple[torch.device, tuple[int, ...]], tuple[Tensor, Tensor]] = {}

    def add(self, sums: Tensor, cells: Sequence[Cell]) -> None:
        """Add `cells` to `sums`, shape (P, COLUMNS)."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Cell]] = {}
        for cell in sorted(cells, key=_place_of):
            by_kind.setdefault((cell[2].device, cell[2].dtype), []).append(cell)
        for kind in by_kind.values():  # nearly always one
            index, lengths = self._where(sums.device, tuple(map(_place_of, kind)))
            values = torch.stack([value for _, _, value in kind]).to(sums.device, sums.dtype)
            # Not index_add_ of repeated places: on a GPU it adds in any order, and replicas of
            # DDP would differ in the last bit.
            sums.view(-1).index_add_(
                0, index, torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)
            )

    def _where(self, device: torch.device, places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The different ones of sorted places, and how often each comes."""
        if (device, places) not in self._index:
            if len(self._index) >= _MOST_INDICES:
                self._index.clear()
            counts = Counter(places)
            self._index[device, places] = (
                torch.tensor(list(counts), device=device),
                torch.tensor(list(counts.values()), device=device),
            )
        return self._index[device, places]


def _place_of(cell: Cell) -> int:
    return cell[0] * COLUMNS + cell[1]

"""Deltas that know nothing of the reasoner, of the same norms: is the gain the direction's?

    random      every entry is +s or -s by a draw, s = |delta| / sqrt(n)
    permuted    delta[r[i], c[j]]: its rows and columns in another order; norm, entries and
                singular values stay

What stands where depends on the seed, the tensor's name and the position in the prior's tensor
alone: the same for any sharding, order or device. |delta| is that of each tensor.

Shapes: a delta is a matrix (rows, cols), see `names.tensors.matrix_shape`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from drift_merge.errors import RecipeError
from drift_merge.maths.masks import hashes, mixed_key
from drift_merge.priors.deltas import Deltas
from drift_merge.storage.fingerprints import key_of
from drift_merge.storage.measured import TensorRecord
from drift_merge.training.options import CONTROLS


@dataclass(frozen=True, slots=True)
class Control:
    """What takes delta's place."""

    kind: str  # one of CONTROLS
    seed: int

    def key(self, name: str) -> int:
        """Of the draws of one tensor."""
        return key_of(self.seed, self.kind, name)


def read_control(text: str | None) -> Control | None:
    """`random:7` or `permuted:7` as a Control; None for None.

    Raises:
        RecipeError: it is neither.
    """
    if text is None:
        return None
    found = re.fullmatch(rf"({'|'.join(CONTROLS)}):(\d+)", str(text))
    if found is None:
        raise RecipeError(
            f"control is {text!r}; expected random:SEED or permuted:SEED.",
            remedy="E.g. control='random:0' (--control random:0), and another seed for another"
            " draw.",
        )
    return Control(found[1], int(found[2]))


class ControlDeltas:
    """Reads like `priors.deltas.Deltas`; what comes is a control's."""

    def __init__(
        self, deltas: Deltas, control: Control, entries: Mapping[str, TensorRecord]
    ) -> None:
        self._deltas, self._control, self._entries = deltas, control, entries
        self._orders: dict[str, tuple[Tensor, Tensor]] = {}
        self.shapes = deltas.shapes

    def is_compressed(self, name: str) -> bool:
        """No: what comes is not as it lies in the files."""
        return False

    def matrix(self, name: str) -> tuple[int, int]:
        """(rows, cols) of a delta."""
        return self._deltas.matrix(name)

    def block(
        self, name: str, rows: tuple[int, int], cols: tuple[int, int], out: Tensor | None = None
    ) -> Tensor:
        """A rectangle; see `Deltas.block`."""
        make = self._random if self._control.kind == "random" else self._permuted
        found = make(name, rows, cols)
        return found if out is None else out.view(found.shape).copy_(found)

    def flat(self, name: str, begin: int, end: int, out: Tensor | None = None) -> Tensor:
        """Elements [begin, end) of the flattened matrix; see `Deltas.flat`."""
        width = self.matrix(name)[1]
        first, last = begin // width, -(-end // width)
        whole = self.block(name, (first, last), (0, width)).reshape(-1)
        found = whole[begin - first * width : end - first * width]
        return found if out is None else out.copy_(found)

    def close(self) -> None:
        """Drop the maps of the prior."""
        self._deltas.close()

    def _random(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        width, count = self.matrix(name)[1], rows[1] - rows[0]
        words = hashes(self._control.key(name), rows[0] * width, count * width)
        signs = words.view(count, width)[:, cols[0] : cols[1]].bitwise_right_shift(31)  # -1 or 0
        size = self._size(name)
        return signs.float().mul_(2.0 * size).add_(size)

    def _size(self, name: str) -> float:
        entry = self._entries[name]
        norm = entry.get("norm_stored", entry["norm_delta"])
        return (norm or 0.0) / sqrt(max(1, prod(self.shapes[name])))

    def _permuted(self, name: str, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        if name not in self._orders:
            key = self._control.key(name)
            self._orders[name] = (
                _order(mixed_key(key, 0), self.matrix(name)[0]),
                _order(mixed_key(key, 1), self.matrix(name)[1]),
            )
        by_row, by_col = self._orders[name]
        gathered = self._deltas.gather(name, by_row[rows[0] : rows[1]])
        return gathered[:, by_col[cols[0] : cols[1]]]


def _order(key: int, size: int) -> Tensor:
    """The numbers below `size` in the order of their hashes; shape (size,), int64."""
    return torch.argsort(hashes(key, 0, size), stable=True)

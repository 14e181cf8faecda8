"""The deltas of a prior by name: read from its files, decompressed where they must be.

    with open_deltas(prior) as deltas:
        rows = deltas.read("layers.0.mlp.up_proj.weight", 0, 128)

Shapes: a delta is seen as a matrix, (rows, cols) = (prod(shape[:-1]), shape[-1]); one of one
dimension has a row per element, (n, 1). What is stored plainly comes in the stored dtype, what is
compressed or of low rank in float32, in new memory. With `out`, both are written there, in its
dtype and on its device. Training looks at whole deltas through a map (`stored`, `factors`).
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from drift_merge.engine.pieces import read_rectangle, read_rows, read_whole
from drift_merge.errors import RecipeError
from drift_merge.maths.compression import decompress_rows
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.lowrank import LowRank
from drift_merge.names.tensors import matrix_shape
from drift_merge.plans.plan import matrix_at
from drift_merge.priors.manifest import Prior, open_shards
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.fingerprints import require_unchanged
from drift_merge.storage.mapped import MappedCheckpoint


class Deltas(AbstractContextManager["Deltas"]):
    """The shards of a prior. Reading is safe from several threads."""

    def __init__(self, shards: Checkpoint, names: Iterable[str]) -> None:
        self._mapped = MappedCheckpoint(shards)
        self._flat: dict[str, Tensor] = {}
        self._scales = shards.scales
        self._factors = shards.factors
        self._lowrank: dict[str, LowRank] = {}
        self._last: tuple[str, LowRank] | None = None  # the factors that were read last
        self.shapes = {name: shards.tensors[name].shape for name in names}  # without scales

    def is_compressed(self, name: str) -> bool:
        """Whether a delta is stored as codes and scales, or as factors."""
        return name in self._scales or name in self._factors

    def is_factored(self, name: str) -> bool:
        """Whether a delta is stored as factors."""
        return name in self._factors

    @property
    def has_factors(self) -> bool:
        """Whether any delta is stored as factors."""
        return bool(self._factors)

    def factors(self, name: str) -> LowRank | None:
        """A delta by its factors, windows on the map; None where it is stored otherwise."""
        stored = self._factors.get(name)
        if stored is None:
            return None
        if name not in self._lowrank:
            infos = [self._mapped.checkpoint.tensors[n] for n in (stored.u, stored.v)]
            u, v = (self._stored(info.name).view(info.shape) for info in infos)
            places = [matrix_at(place) for place in stored.places]
            self._lowrank[name] = LowRank(places, u, v)
        for each in (stored.u, stored.v):
            self._mapped.check(self._mapped.checkpoint.tensors[each])
        return self._lowrank[name]

    def matrix(self, name: str) -> tuple[int, int]:
        """(rows, cols) of a delta.

        Raises:
            RecipeError: the prior has none of this name.
        """
        if name not in self.shapes:
            raise RecipeError(
                f"{self._mapped.checkpoint.source.given} has no delta {name!r}.",
                remedy="See their names: drift-prior inspect PRIOR --json",
            )
        return matrix_shape(self.shapes[name])

    def read(
        self, name: str, begin: int = 0, end: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Rows [begin, end) of a delta, (end - begin, cols); all by default."""
        rows, cols = self.matrix(name)
        end = rows if end is None else end
        return self.block(name, (begin, end), (0, cols), out)

    def block(
        self, name: str, rows: tuple[int, int], cols: tuple[int, int], out: Tensor | None = None
    ) -> Tensor:
        """A rectangle of a delta.

        Args:
            name: canonical name.
            rows: first row and the end.
            cols: first column and the end.
            out: contiguous, of that many rows and columns; float32 or float64.

        Raises:
            RecipeError: there is no such delta, or it is smaller.
        """
        height, width = self.matrix(name)
        self._require(name, rows, height)
        self._require(name, cols, width)
        size = (rows[1] - rows[0], cols[1] - cols[0])
        out = None if out is None else out.view(size)
        if name in self._factors:
            return self._read_factors(name).dense(rows, cols, out)
        offset = rows[0] * width + cols[0]
        if name not in self._scales:
            return self._read(name, offset, (width, 1), size, out)
        stored = self._read(name, offset, (width, 1), size)
        scales = self._read(self._scales[name], rows[0], (1, 1), (1, size[0]))
        return decompress_rows(stored, scales.view(-1), out)

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Some rows of a delta, in any order: (len(rows), cols), new memory.

        Args:
            name: canonical name.
            rows: their numbers, shape (n,), int64.
        """
        if name in self._factors:
            raise RecipeError(
                f"{name} is stored by its factors: its rows cannot be taken one by one.",
                remedy="Use a prior that was computed without --rank, or control='random:SEED'.",
            )
        info = self._mapped.checkpoint.tensors[name]
        width = self.matrix(name)[1]
        stored = torch.empty(len(rows), width, dtype=TORCH_DTYPES[info.dtype])
        read_rows(self._mapped, [info], rows.tolist(), stored)
        if name not in self._scales:
            return stored
        scales = read_whole(self._mapped, self._mapped.checkpoint.tensors[self._scales[name]])[0]
        return decompress_rows(stored, scales.view(-1)[rows])

    def flat(self, name: str, begin: int, end: int, out: Tensor | None = None) -> Tensor:
        """Elements [begin, end) of a flattened delta, (end - begin,).

        Args:
            name: canonical name.
            begin: first element; need not be that of a row.
            end: one past the last.
            out: flat, `end - begin` elements, contiguous; float32 or float64.
        """
        rows, cols = self.matrix(name)
        self._require(name, (begin, end), rows * cols)
        if not self.is_compressed(name):
            line = None if out is None else out.view(1, -1)
            found = self._read(name, begin, (1, 1), (1, end - begin), line)
            return found.view(-1) if out is None else out
        target = torch.empty(end - begin) if out is None else out
        for first, last in _row_ranges(begin, end, cols):
            row, col = divmod(first, cols)
            count = max(1, (last - first) // cols)
            piece = target[first - begin : last - begin].view(count, -1)
            self.block(name, (row, row + count), (col, col + piece.shape[1]), piece)
        return target

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A delta as it lies in the file, (rows, cols), and the scales of its rows, or None.

        Windows on the map, read only: values, or codes that `maths.compression` explains.
        """
        scales = self._stored(self._scales[name]) if name in self._scales else None
        return self._stored(name).view(self.matrix(name)), scales

    def _read(
        self,
        name: str,
        offset: int,
        strides: tuple[int, int],
        size: tuple[int, int],
        out: Tensor | None = None,
    ) -> Tensor:
        """A rectangle of a stored tensor, in new memory or in `out`."""
        info = self._mapped.checkpoint.tensors[name]
        if out is not None and out.device.type == "cpu":
            read_rectangle(self._mapped, info, offset, strides, out)
            return out
        found = torch.empty(size, dtype=TORCH_DTYPES[info.dtype])
        read_rectangle(self._mapped, info, offset, strides, found)
        return found if out is None else out.copy_(found)

    def _read_factors(self, name: str) -> LowRank:
        """The factors of a delta, read into memory; the last ones are kept for its other blocks."""
        last = self._last
        if last is None or last[0] != name:
            stored, tensors = self._factors[name], self._mapped.checkpoint.tensors
            u, v = (read_whole(self._mapped, tensors[n])[0] for n in (stored.u, stored.v))
            last = (name, LowRank([matrix_at(place) for place in stored.places], u, v))
            self._last = last
        return last[1]

    def _stored(self, name: str) -> Tensor:
        """A stored tensor, flat and read only, as a window on the map."""
        info = self._mapped.checkpoint.tensors[name]
        if name in self._flat:
            self._mapped.check(info)
            return self._flat[name]
        data, dtype = self._mapped.view(info), TORCH_DTYPES[info.dtype]
        empty = torch.empty(0, dtype=dtype)
        self._flat[name] = torch.frombuffer(data, dtype=dtype) if info.numel else empty
        return self._flat[name]

    def _require(self, name: str, found: tuple[int, int], size: int) -> None:
        if not 0 <= found[0] <= found[1] <= size:
            raise RecipeError(
                f"{name}: [{found[0]}, {found[1]}) is asked for; it has {size:,}.",
                remedy=f"Its shape is {self.shapes[name]}.",
            )

    def require_unchanged(self) -> None:
        """Refuse what was made of a prior that was changed or replaced meanwhile.

        Raises:
            CheckpointError: naming the shard.
        """
        require_unchanged(self._mapped.checkpoint)

    def close(self) -> None:
        """Drop the maps; a map that is still looked at lives until its tensors do."""
        self._flat.clear()
        self._lowrank.clear()
        self._last = None
        self._mapped.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_deltas(prior: Prior) -> Deltas:
    """Map the shards of a prior, compressed or not.

    Raises:
        CheckpointError: a shard is missing or broken, or differs from the manifest.
    """
    return Deltas(open_shards(prior), prior.tensors)


def _row_ranges(begin: int, end: int, cols: int) -> list[tuple[int, int]]:
    """A flat range as the rest of a row, whole rows, and the start of a row; none is empty."""
    first = min(-(-begin // cols) * cols, end)
    last = max(end // cols * cols, first)
    ranges = [(begin, first), (first, last), (last, end)]
    return [(one, other) for one, other in ranges if one < other]

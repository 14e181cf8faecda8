"""Reads the stored values of the inputs, in the order of the output tensor.

An identity view is read as it lies. A view in parts (fused or split
projections, experts, transposed experts) or in rows (other vocabularies) is put together in
scratch memory, chunk by chunk.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import reduce

import torch
from torch import Tensor

from drift_merge.engine.pieces import read_rectangle, read_rows, read_whole
from drift_merge.engine.workspace import HostBuffer
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.lowrank import LowRank
from drift_merge.names.tensors import Part, matrix_shape
from drift_merge.plans.plan import Step, View, matrix_at
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.mapped import HeldShards, MappedCheckpoint
from drift_merge.storage.sources import RemoteShard

# Rows of what is stored turned are put together so many bytes at a time, and kept for the chunks
# that follow: each row has one element in every line of the file.
_BAND_BYTES = 2**24


class Inputs(AbstractContextManager["Inputs"]):
    """The sources of a plan. Safe to share between threads."""

    def __init__(self, sources: Sequence[Checkpoint], cache: HeldShards | None = None) -> None:
        self._maps = [MappedCheckpoint(one, cache, share=len(sources)) for one in sources]
        if cache is not None:
            cache.on_evict = self._drop

    def drop_remote(self) -> None:
        """Close all shards of the cache, which another process may be about to delete."""
        for mapped in self._maps:
            mapped.drop_remote()

    def _drop(self, shard: RemoteShard) -> None:
        for mapped in self._maps:
            for name, remote in mapped.checkpoint.remote.items():
                if remote == shard:
                    mapped.drop(name)

    def __exit__(self, *_: object) -> None:
        for mapped in self._maps:
            mapped.close()

    def dtype(self, view: View) -> torch.dtype:
        """The stored dtype of a view; the widest where its parts differ."""
        names = {part.name for part in view.parts}
        found = {TORCH_DTYPES[self._info(view.source, name).dtype] for name in names}
        return reduce(torch.promote_types, found)

    def chunk(
        self, view: View, shape: tuple[int, ...], begin: int, end: int, scratch: HostBuffer
    ) -> tuple[Tensor, memoryview]:
        """Elements [begin, end) of a view in the shape of the output, flat.

        Args:
            view: what to read.
            shape: of the output tensor.
            begin: first element; a multiple of the row length unless the view is an identity.
            end: one past the last element; likewise.
            scratch: memory for views that must be put together.

        Returns:
            Flat tensor in the stored dtype and its bytes; read only.
        """
        if view.is_identity:
            info = self._info(view.source, view.parts[0].name)
            dtype = TORCH_DTYPES[info.dtype]
            values = scratch.tensor(dtype, end - begin)
            data = scratch.bytes((end - begin) * dtype.itemsize)
            self._maps[view.source].read(info, begin * dtype.itemsize, data)
            return values, data
        dtype = self.dtype(view)
        rows, cols = matrix_shape(shape)
        first, last = begin // cols, end // cols
        held = scratch.held
        if held is None or held[0] is not view or not held[1] <= first <= last <= held[2]:
            stop = last
            if any(part.col_stride > part.row_stride for part in view.parts):
                stop = max(last, min(rows, first + _BAND_BYTES // (cols * dtype.itemsize)))
            grid = scratch.tensor(dtype, (stop - first) * cols).view(-1, cols)
            if view.rows is not None:
                self._gather(view, grid, first, stop)
            for part in view.parts if view.rows is None else ():
                self._place(view.source, part, grid, first)
            held = (view, first, stop)
        target = scratch.tensor(dtype, (held[2] - held[1]) * cols)
        scratch.held = held
        at, size = begin - held[1] * cols, end - begin
        data = scratch.bytes(target.nbytes)
        return (
            target[at : at + size],
            data[at * dtype.itemsize : (at + size) * dtype.itemsize],
        )

    def missing_rows(self, view: View, begin_row: int, end_row: int) -> list[int]:
        """Rows of [begin_row, end_row) without a partner, counted from begin_row."""
        if view.rows is None:
            return []
        rows = view.rows.rows[begin_row:end_row]
        return [i for i, row in enumerate(rows) if row < 0]

    def factors(self, view: View) -> list[tuple[Tensor, memoryview]]:
        """A (rank, inputs), B (outputs, rank), DoRA's magnitudes; as stored, with their bytes."""
        assert view.adapter is not None
        mapped = self._maps[view.source]
        return [read_whole(mapped, self._info(view.source, name)) for name in view.adapter.names]

    def scales(self, view: View) -> tuple[Tensor, memoryview]:
        """The scales of the rows of a compressed view, (rows,), float32; and their bytes."""
        return read_whole(self._maps[view.source], self._info(view.source, view.scale))

    def lowrank(self, view: View) -> tuple[LowRank, list[memoryview]]:
        """A view of low rank by its factors, and their bytes."""
        assert view.factors is not None
        names = (view.factors.u, view.factors.v)
        found = [read_whole(self._maps[view.source], self._info(view.source, n)) for n in names]
        places = [matrix_at(place) for place in view.factors.places]
        return LowRank(places, found[0][0], found[1][0]), [data for _, data in found]

    def mapped(self, source: int) -> MappedCheckpoint:
        """The data of one source."""
        return self._maps[source]

    def _place(self, source: int, part: Part, grid: Tensor, first_row: int) -> None:
        """Copy the rows of a part that fall into the grid, whose first row is `first_row`."""
        top = max(part.row, first_row)
        bottom = min(part.row + part.rows, first_row + grid.shape[0])
        if top >= bottom:
            return
        offset = part.offset + (top - part.row) * part.row_stride
        read_rectangle(
            self._maps[source],
            self._info(source, part.name),
            offset,
            (part.row_stride, part.col_stride),
            grid[top - first_row : bottom - first_row, part.col : part.col + part.cols],
        )

    def _gather(self, view: View, grid: Tensor, first_row: int, end_row: int) -> None:
        """Rows by number, counted on from one part to the next: the pieces of one table."""
        assert view.rows is not None
        pieces = [self._info(view.source, part.name) for part in view.parts]
        # Rows without a partner take row 0 here; the stream overwrites them with the mllm's.
        read_rows(self._maps[view.source], pieces, view.rows.rows[first_row:end_row], grid)

    def _info(self, source: int, name: str) -> TensorInfo:
        return self._maps[source].checkpoint.tensors[name]


def chunks(step: Step, elements: int, *, by_rows: bool = False) -> list[tuple[int, int]]:
    """Cut a step into ranges of about `elements`; whole rows if a view or the method needs it.

    The cuts depend on the step alone, never on threads, so that measured sums are reproducible.
    """
    rows, cols = matrix_shape(step.shape)
    numel = rows * cols
    row = cols if len(step.shape) > 1 else numel  # a method sees a 1-D tensor as one row
    unit = row if by_rows else 1 if all(view.is_identity for view in step.inputs) else cols
    elements = max(1, elements // max(unit, 1)) * max(unit, 1)
    return [(begin, min(begin + elements, numel)) for begin in range(0, numel, elements)]

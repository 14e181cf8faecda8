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

from drift_merge.engine.workspace import HostBuffer
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.lowrank import LowRank
from drift_merge.names.tensors import Part, matrix_shape
from drift_merge.plans.plan import Step, View, matrix_at
from drift_merge.storage.checkpoint import Checkpoint
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.mapped import HeldShards, MappedCheckpoint
from drift_merge.storage.sources import RemoteShard


class Inputs(AbstractContextManager["Inputs"]):
    """The mapped sources of a plan. Safe to share between threads."""

    def __init__(self, sources: Sequence[Checkpoint], cache: HeldShards | None = None) -> None:
        self._maps = [MappedCheckpoint(one, cache, share=len(sources)) for one in sources]
        if cache is not None:
            cache.on_evict = self._drop

    def require_sizes(self) -> None:
        """Look whether a shard has changed its size; see `MappedCheckpoint.require_sizes`."""
        for mapped in self._maps:
            mapped.require_sizes()

    def drop_remote(self) -> None:
        """Unmap all shards of the cache, which another process may be about to delete."""
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
        _, cols = matrix_shape(shape)
        target = scratch.tensor(dtype, end - begin)
        grid = target.view(-1, cols)
        if view.rows is not None:
            self._gather(view, grid, begin // cols, end // cols)
        else:
            for part in view.parts:
                self._place(view.source, part, grid, begin // cols)
        return target, scratch.bytes((end - begin) * dtype.itemsize)

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
        infos = [self._info(view.source, name) for name in view.adapter.names]
        return [(self._flat(view.source, i.name).view(i.shape), mapped.view(i)) for i in infos]

    def scales(self, view: View) -> tuple[Tensor, memoryview]:
        """The scales of the rows of a compressed view, (rows,), float32; and their bytes."""
        info = self._info(view.source, view.scale)
        return self._flat(view.source, view.scale), self._maps[view.source].view(info)

    def lowrank(self, view: View) -> tuple[LowRank, list[memoryview]]:
        """A view of low rank by its factors, and their bytes."""
        assert view.factors is not None
        infos = [self._info(view.source, n) for n in (view.factors.u, view.factors.v)]
        u, v = (self._flat(view.source, i.name).view(i.shape) for i in infos)
        data = [self._maps[view.source].view(info) for info in infos]
        return LowRank([matrix_at(place) for place in view.factors.places], u, v), data

    def mapped(self, source: int) -> MappedCheckpoint:
        """The map of one source."""
        return self._maps[source]

    def release(self, step: Step, begin: int, end: int, total: int) -> None:
        """Hand back the pages behind bytes [begin, end) of the `total` of an output tensor."""
        for view in step.inputs:
            mapped = self._maps[view.source]
            if view.is_identity:
                info = self._info(view.source, view.parts[0].name)
                size = info.size_bytes
                mapped.release(info, begin * size // total, end * size // total)
                continue
            if view.factors is not None:
                continue  # thin, and read again for every chunk
            for name in {part.name for part in view.parts}:
                info = self._info(view.source, name)
                mapped.release(info, 0, info.size_bytes)

    def _place(self, source: int, part: Part, grid: Tensor, first_row: int) -> None:
        """Copy the rows of a part that fall into the grid, whose first row is `first_row`."""
        top = max(part.row, first_row)
        bottom = min(part.row + part.rows, first_row + grid.shape[0])
        if top >= bottom:
            return
        stored = self._flat(source, part.name)
        offset = part.offset + (top - part.row) * part.row_stride
        block = stored.as_strided(
            (bottom - top, part.cols), (part.row_stride, part.col_stride), offset
        )
        grid[top - first_row : bottom - first_row, part.col : part.col + part.cols].copy_(block)

    def _gather(self, view: View, grid: Tensor, first_row: int, end_row: int) -> None:
        """Rows by number, counted on from one part to the next: the pieces of one table."""
        assert view.rows is not None
        rows = torch.tensor(list(view.rows.rows[first_row:end_row]), dtype=torch.int64)
        # Rows without a partner take row 0 here; the stream overwrites them with the mllm's.
        rows.clamp_(min=0)
        pieces = [self._flat(view.source, p.name).view(-1, grid.shape[1]) for p in view.parts]
        if len(pieces) == 1:
            torch.index_select(pieces[0], 0, rows, out=grid)
            return
        first = 0
        for piece in pieces:
            own = ((rows >= first) & (rows < first + len(piece))).nonzero().view(-1)
            grid[own] = piece[rows[own] - first].to(grid.dtype)
            first += len(piece)

    def _flat(self, source: int, name: str) -> Tensor:
        info = self._info(source, name)
        return torch.frombuffer(self._maps[source].view(info), dtype=TORCH_DTYPES[info.dtype])

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

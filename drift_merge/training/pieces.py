"""Pieces: one unit's share on this rank, measured chunk by chunk and then biased.

Shapes: a chunk is flat, n elements; float32 arithmetic (float64 for float64 gradients).
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.training.deltas import DeltaSource
from drift_merge.training.layouts import GradientLayout
from drift_merge.training.units import Block, Region, Unit, blocks

CPU_CHUNK = 2**18  # as in the engine: stays in the cache of a core
GPU_CHUNK = 2**23
COLUMNS = 3  # of sums: g*g, g*delta, delta*delta

Cell = tuple[int, int, Tensor]  # row and column of the sums, and what is added there, 0-dim


class Piece(Protocol):
    """Something whose gradient gets `g -= c * delta`, with the c of its slot."""

    slot: int  # row of the sums
    numel: int  # elements on this rank

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks whose sums belong together."""

    def measure(self, scratch: "Scratch") -> list[Cell] | None:
        """This rank's sums; None if there is no gradient."""

    def bias(self, coefficients: Tensor, scratch: "Scratch") -> None:
        """Subtract coefficients[slot] * delta from the gradient."""


class Scratch:
    """Buffers of one worker, made once; two chunks a dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elements = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """The first `numel` elements of a buffer."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(max(numel, self.elements), dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:numel]


class DensePiece:
    """A region of a parameter and the same region of delta."""

    def __init__(
        self,
        unit: Unit,
        slot: int,
        region: Region | None,
        layout: GradientLayout,
        source: DeltaSource,
        elements: int,
    ) -> None:
        self.unit, self.slot, self._layout, self._source = unit, slot, layout, source
        self.chunks: list[tuple[int, Block]] = []
        self.numel = 0
        for block in blocks(unit, region, elements) if region else ():
            self.chunks.append((self.numel, block))
            self.numel += block.numel

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks whose sums belong together."""
        return self._layout.group(self.unit)

    def measure(self, scratch: Scratch) -> list[Cell] | None:
        """This rank's g*g and g*delta; None if there is no gradient."""
        if not self.chunks:
            return []
        found = self._layout.gradient(self.unit)
        if found is None:
            return None
        flat = found.reshape(-1)
        cells: list[Cell] = []
        for begin, block in self.chunks:
            gradient = _compute(flat[begin : begin + block.numel], scratch)
            delta = self._delta(begin, block, gradient.dtype, scratch)
            cells.append((self.slot, 0, torch.dot(gradient, gradient)))
            cells.append((self.slot, 1, torch.dot(gradient, delta)))
        return cells

    def bias(self, coefficients: Tensor, scratch: Scratch) -> None:
        """Subtract coefficients[slot] * delta from the gradient, chunk by chunk."""
        found = self._layout.gradient(self.unit) if self.chunks else None
        if found is None:
            return
        flat = found.reshape(-1)
        for begin, block in self.chunks:
            stored = flat[begin : begin + block.numel]
            gradient = _compute(stored, scratch)
            delta = self._delta(begin, block, gradient.dtype, scratch)
            gradient.sub_(delta.mul_(coefficients[self.slot].to(delta.dtype)))
            if gradient is not stored:
                stored.copy_(gradient)
        if flat.data_ptr() != found.data_ptr():
            found.copy_(flat.view(found.shape))
        self._layout.put(self.unit, found)

    def measure_start(self, scratch: Scratch) -> list[Cell]:
        """This rank's delta*delta, and delta*theta in the column of g*delta."""
        cells: list[Cell] = []
        values = self._layout.values(self.unit) if self.chunks else None
        flat = None if values is None else values.reshape(-1)
        for begin, block in self.chunks:
            dtype = torch.float32 if flat is None else _compute_dtype(flat.dtype)
            delta = self._delta(begin, block, dtype, scratch)
            cells.append((self.slot, 2, torch.dot(delta, delta)))
            if flat is not None:
                theta = _compute(flat[begin : begin + block.numel], scratch)
                cells.append((self.slot, 1, torch.dot(theta, delta)))
        return cells

    def _delta(self, begin: int, block: Block, dtype: torch.dtype, scratch: Scratch) -> Tensor:
        delta = scratch.get("delta", block.numel, dtype)
        self._source.chunk(self.unit, begin, block, delta)
        return delta


def add_cells(sums: Tensor, cells: list[Cell]) -> None:
    """Add many 0-dim sums to their rows and columns, by one kernel."""
    if cells:
        index = torch.tensor([row * sums.shape[1] + column for row, column, _ in cells])
        values = torch.stack([value for _, _, value in cells]).to(sums.dtype)
        sums.view(-1).index_add_(0, index.to(sums.device), values)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compute(stored: Tensor, scratch: Scratch) -> Tensor:
    """A chunk of gradients or weights in the dtype of the arithmetic; itself where it has it."""
    dtype = _compute_dtype(stored.dtype)
    if stored.dtype == dtype:
        return stored
    return scratch.get("gradient", stored.numel(), dtype).copy_(stored)

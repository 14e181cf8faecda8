"""Measures and biases the gradient of one unit on this rank, chunk by chunk.

Shapes: a chunk is flat, n elements; float32 arithmetic (float64 for float64 gradients).
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drift_merge.maths.lowrank import Rectangle, inner, squared, subtract_
from drift_merge.training.deltas.files import DeltaSource
from drift_merge.training.gradients.layout import GradientLayout
from drift_merge.training.inject.kernels.runs import Run, can_take
from drift_merge.training.inject.scratch import CPU_GRADIENT_CHUNK, Scratch, computed
from drift_merge.training.inject.uses import DeltaUse
from drift_merge.training.units import Block, Region, Unit, blocks_of

# Columns of sums: g*g, g*delta (or theta*delta), delta*delta, and theta*delta beside the others.
GRAD_SQ, DOT, DELTA_SQ, PLACE = 0, 1, 2, 3
COLUMNS = 4

Cell = tuple[int, int, Tensor]  # row and column of the sums, and what is added there, 0-dim


class Piece(Protocol):
    """A gradient on this rank that gets `g -= c * delta`, with the c of its slot."""

    source: DeltaSource | None

    @property
    def is_fixed(self) -> bool:
        """Whether delta is the same at every step."""

    @property
    def slot(self) -> int:
        """Row of the sums."""

    @property
    def layer(self) -> int | None:
        """Of the model."""

    @property
    def numel(self) -> int:
        """Elements of the gradient on this rank."""

    @property
    def tie(self) -> object:
        """Pieces with equal ties are all measured before one of them is biased."""

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks whose sums belong together."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Whose gradient it is."""

    @property
    def parameter_names(self) -> Sequence[str]:
        """Their names, for messages."""

    def device(self) -> torch.device | None:
        """Where the gradient lies; None if there is none."""

    def measure(self, scratch: Scratch) -> list[Cell] | None:
        """This rank's sums; None if there is no gradient."""

    def bias(self, coefficient: Tensor, scratch: Scratch) -> None:
        """Subtract coefficient (0-dim) * delta from the gradient."""

    def run(self, device: torch.device) -> Run | None:
        """Gradient and delta for the kernels of a device; None: `measure` and `bias` are called."""

    def put(self, run: Run) -> None:
        """Store a gradient that a kernel has biased."""

    def position(self, scratch: Scratch) -> list[Cell]:
        """This rank's theta*delta, and delta*delta where that is the same at every step."""


class DensePiece:
    """The gradient of a region of a parameter, and the same region of delta."""

    def __init__(
        self,
        unit: Unit,
        slot: int,
        region: Region | None,
        layout: GradientLayout,
        use: DeltaUse | None = None,
    ) -> None:
        self.use = use or DeltaUse()
        self.unit, self.slot, self.region, self.tie = unit, slot, region, (slot,)
        self.layer = unit.layer
        self.source: DeltaSource | None = None  # set when it is known where gradients lie
        self._layout = layout
        self._chunks: dict[int, tuple[tuple[int, Block], ...]] = {}
        self.numel = sum(block.numel for _, block in self.chunks(CPU_GRADIENT_CHUNK))

    @property
    def is_fixed(self) -> bool:
        """Whether delta is the same at every step."""
        return self.use.is_stored

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks whose sums belong together."""
        return self._layout.group(self.unit)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Whose gradient it is."""
        assert self.unit.parameter is not None
        return (self.unit.parameter,)

    @property
    def parameter_names(self) -> Sequence[str]:
        """Its name."""
        return (self.unit.parameter_name,)

    def chunks(self, elements: int) -> tuple[tuple[int, Block], ...]:
        """First element in the flattened region, and the block, of every chunk."""
        if elements not in self._chunks:
            found, begin = [], 0
            for block in blocks_of(self.unit, self.region, elements) if self.region else ():
                found.append((begin, block))
                begin += block.numel
            self._chunks[elements] = tuple(found)
        return self._chunks[elements]

    def device(self) -> torch.device | None:
        """Where the gradient lies; None if there is none."""
        found = self._layout.gradient(self.unit) if self.numel else None
        return None if found is None else found.device

    def measure(self, scratch: Scratch) -> list[Cell] | None:
        """This rank's g*g and g*delta; None if there is no gradient."""
        if not self.numel:
            return []
        found = self._layout.gradient(self.unit)
        if found is None:
            return None
        flat, scratch = found.reshape(-1), scratch.at(found.device)
        cells: list[Cell] = []
        for begin, block in self.chunks(scratch.elements):
            gradient = computed(flat[begin : begin + block.numel], scratch)
            parts = self._step_factors(block, gradient)
            if parts is None:
                cells += self._read_sums(begin, block, gradient, scratch)
            else:
                product = inner(gradient.view(block.rows, block.cols), parts)
                cells.append((self.slot, DOT, product))
            cells.append((self.slot, GRAD_SQ, torch.dot(gradient, gradient)))
        return cells

    def _read_sums(
        self, begin: int, block: Block, gradient: Tensor, scratch: Scratch
    ) -> Iterator[Cell]:
        """The sums of a chunk with delta, which is read and kept."""
        delta = scratch.keep((self, begin), block.numel, gradient.dtype)
        self._read(begin, block, delta)
        if self.use.is_placed:
            theta = self._theta(begin, delta)
            yield self.slot, PLACE, torch.dot(theta.to(delta), delta)
        if not self.use.is_stored:
            self._use(begin, gradient, delta)
            yield self.slot, DELTA_SQ, torch.dot(delta, delta)
        yield self.slot, DOT, torch.dot(gradient, delta)

    def bias(self, coefficient: Tensor, scratch: Scratch) -> None:
        """Subtract coefficient * delta, the last chunk first: it is still in the cache."""
        found = self._layout.gradient(self.unit) if self.numel else None
        if found is None:
            return
        flat, scratch = found.reshape(-1), scratch.at(found.device)
        dtype = torch.float64 if found.dtype == torch.float64 else torch.float32
        coefficient = coefficient.to(found.device, dtype)
        for begin, block in reversed(self.chunks(scratch.elements)):
            stored = flat[begin : begin + block.numel]
            gradient = computed(stored, scratch)
            self._subtract(gradient, coefficient, begin, block, scratch)
            if gradient is not stored:
                stored.copy_(gradient)
        if flat.data_ptr() != found.data_ptr():  # reshape made a copy
            found.copy_(flat.view(found.shape))
        self._layout.put(self.unit, found)

    def run(self, device: torch.device) -> Run | None:
        """Gradient and delta where each lies in one piece; None where kernels cannot do it."""
        if not self.use.is_stored or self.use.is_placed:
            return None
        found = self._layout.gradient(self.unit) if self.numel else None
        if found is None or found.device != device or not found.is_contiguous():
            return None
        assert self.source is not None
        assert self.region is not None
        delta = self.source.direct(self.unit, self.region)
        if delta is None or not can_take(found, delta.elements):
            return None
        return Run(self.slot, found.view(-1), delta, found)

    def put(self, run: Run) -> None:
        """Store the gradient."""
        self._layout.put(self.unit, run.whole)

    def _subtract(
        self, gradient: Tensor, coefficient: Tensor, begin: int, block: Block, scratch: Scratch
    ) -> None:
        """Bias a chunk of the gradient, flat, in place."""
        parts = self._step_factors(block, gradient)
        if parts is not None:
            subtract_(gradient.view(block.rows, block.cols), parts, coefficient)
            return
        delta = scratch.kept((self, begin))
        if delta is None:
            delta = scratch.get("delta", block.numel, gradient.dtype)
            self._read(begin, block, delta)
            self._use(begin, gradient, delta)
        gradient.addcmul_(delta, coefficient, value=-1)

    def position(self, scratch: Scratch) -> list[Cell]:
        """This rank's theta*delta and delta*delta."""
        values = self._layout.values(self.unit) if self.numel else None
        flat = None if values is None else values.reshape(-1)
        scratch = scratch if flat is None else scratch.at(flat.device)
        cells: list[Cell] = []
        for begin, block in self.chunks(scratch.elements):
            theta = None
            if flat is not None:
                theta = computed(flat[begin : begin + block.numel], scratch)
            dtype = torch.float32 if theta is None else theta.dtype
            like = torch.empty(0, dtype=dtype, device=scratch.device) if theta is None else theta
            parts = self._factors(block, like)
            if parts is not None:
                cells.append((self.slot, DELTA_SQ, squared(parts)))
                if theta is not None:
                    product = inner(theta.view(block.rows, block.cols), parts)
                    cells.append((self.slot, DOT, product))
                continue
            delta = scratch.get("delta", block.numel, dtype)
            self._read(begin, block, delta)
            cells.append((self.slot, DELTA_SQ, torch.dot(delta, delta)))
            if theta is not None:
                cells.append((self.slot, DOT, torch.dot(theta, delta)))
        return cells

    def _factors(self, block: Block, like: Tensor) -> Sequence[Rectangle] | None:
        """A block of delta by factors; None where it must be read."""
        assert self.source is not None
        return self.source.factors(self.unit, block, like)

    def _step_factors(self, block: Block, like: Tensor) -> Sequence[Rectangle] | None:
        """The same in a step: None too where the rule goes entry by entry, or by the weights."""
        if not self.use.is_stored or self.use.is_placed:
            return None
        return self._factors(block, like)

    def _read(self, begin: int, block: Block, delta: Tensor) -> None:
        assert self.source is not None
        self.source.chunk(self.unit, begin, block, delta)

    def _use(self, begin: int, gradient: Tensor, delta: Tensor) -> None:
        """Make delta what the rule uses of it, in place; the gradient is not biased yet."""
        if self.use.needs_weights:
            assert self.use.beginning is not None
            theta = self._theta(begin, delta)
            self.use.beginning.take_away(self.unit, begin, theta, delta)
        self.use.keep_unopposed(gradient, delta)

    def _theta(self, begin: int, delta: Tensor) -> Tensor:
        """The weights of a chunk as they are now, flat."""
        values = self._layout.values(self.unit)
        assert values is not None
        return values.reshape(-1)[begin : begin + delta.numel()]

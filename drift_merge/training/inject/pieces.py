"""Measures and biases the gradient of one unit on this rank, chunk by chunk.

Shapes: a chunk is flat, n elements; float32 arithmetic (float64 for float64 gradients).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from drift_merge.training.deltas.files import DeltaSource
from drift_merge.training.gradients.layout import GradientLayout
from drift_merge.training.inject.uses import DeltaUse
from drift_merge.training.units import Block, Region, Unit, blocks_of

# Elements. Smaller chunks stay in a smaller cache, but cost more in calls: 2**17 a tenth more.
CPU_GRADIENT_CHUNK = 2**19
GPU_GRADIENT_CHUNK = 2**23
_KEPT = 2**21  # elements of widened deltas that are kept on a CPU from the first pass to the second
# Columns of sums: g*g, g*delta (or theta*delta), delta*delta, and theta*delta beside the others.
GRAD_SQ, DOT, DELTA_SQ, PLACE = 0, 1, 2, 3
COLUMNS = 4
_MOST_INDICES = 10_000  # that are kept; gradients that come and go (experts) make ever new ones

Cell = tuple[int, int, Tensor]  # row and column of the sums, and what is added there, 0-dim


class Scratch:
    """Buffers on one device, made once however large the tensors are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.elements = CPU_GRADIENT_CHUNK if device.type == "cpu" else GPU_GRADIENT_CHUNK
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._kept: dict[tuple[object, int], Tensor] = {}
        self._used = 0  # elements of the buffer of kept deltas
        self._others: dict[torch.device, Scratch] = {}

    def at(self, device: torch.device) -> "Scratch":
        """The same on another device, where a model lies on several."""
        if device == self.device:
            return self
        if device not in self._others:
            self._others[device] = Scratch(device)
        return self._others[device]

    def get(self, name: str, numel: int, dtype: torch.dtype, *, capacity: int = 0) -> Tensor:
        """The first `numel` elements of a buffer, which holds `capacity` at least."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            size = max(numel, capacity, self.elements)
            buffer = torch.empty(size, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:numel]

    def keep(self, key: tuple[object, int], numel: int, dtype: torch.dtype) -> Tensor:
        """Memory for a delta; `kept` finds it again until `forget`, if there was room for it."""
        room = _KEPT if self.device.type == "cpu" else 0
        if self._used + numel > room:
            return self.get("delta", numel, dtype)
        whole = self.get("kept", room, dtype, capacity=room)
        self._kept[key] = whole[self._used : self._used + numel]
        self._used += numel
        return self._kept[key]

    def kept(self, key: tuple[object, int]) -> Tensor | None:
        """A delta that was kept."""
        return self._kept.get(key)

    def forget(self) -> None:
        """Start anew with what is kept."""
        self._kept.clear()
        self._used = 0
        for other in self._others.values():
            other.forget()


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
            delta = scratch.keep((self, begin), block.numel, gradient.dtype)
            self._read(begin, block, delta)
            if self.use.is_placed:
                theta = self._theta(begin, delta)
                cells.append((self.slot, PLACE, torch.dot(theta.to(delta), delta)))
            if not self.use.is_stored:
                self._use(begin, gradient, delta)
                cells.append((self.slot, DELTA_SQ, torch.dot(delta, delta)))
            cells.append((self.slot, DOT, torch.dot(gradient, delta)))
            cells.append((self.slot, GRAD_SQ, torch.dot(gradient, gradient)))
        return cells

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
            delta = scratch.kept((self, begin))
            if delta is None:
                delta = scratch.get("delta", block.numel, gradient.dtype)
                self._read(begin, block, delta)
                self._use(begin, gradient, delta)
            gradient.addcmul_(delta, coefficient, value=-1)
            if gradient is not stored:
                stored.copy_(gradient)
        if flat.data_ptr() != found.data_ptr():  # reshape made a copy
            found.copy_(flat.view(found.shape))
        self._layout.put(self.unit, found)

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
            delta = scratch.get("delta", block.numel, dtype)
            self._read(begin, block, delta)
            cells.append((self.slot, DELTA_SQ, torch.dot(delta, delta)))
            if theta is not None:
                cells.append((self.slot, DOT, torch.dot(theta, delta)))
        return cells

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


class ScatterAdd:
    """Adds 0-dim values to rows and columns of sums, many by one kernel."""

    def __init__(self) -> None:
        # Where the cells of a batch go is the same at every step; to send it to a device each
        # time would wait for the host.
        self._index: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def add(self, sums: Tensor, cells: Sequence[Cell]) -> None:
        """Add `cells` to `sums`, shape (P, COLUMNS)."""
        by_kind: dict[tuple[torch.device, torch.dtype], list[Cell]] = {}
        for cell in cells:
            by_kind.setdefault((cell[2].device, cell[2].dtype), []).append(cell)
        for kind in by_kind.values():  # nearly always one
            places = tuple(row * COLUMNS + column for row, column, _ in kind)
            index = self._index.get((sums.device, places))
            if index is None:
                if len(self._index) >= _MOST_INDICES:
                    self._index.clear()
                index = torch.tensor(places, device=sums.device)
                self._index[sums.device, places] = index
            values = torch.stack([value for _, _, value in kind]).to(sums.device, sums.dtype)
            sums.view(-1).index_add_(0, index, values)


def computed(stored: Tensor, scratch: Scratch) -> Tensor:
    """A chunk of gradients or weights in the dtype of the arithmetic; itself where it has it."""
    dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
    if stored.dtype == dtype:
        return stored
    return scratch.get("wide", stored.numel(), dtype).copy_(stored)

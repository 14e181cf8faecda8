"""What a merge method sees: chunks of one output tensor, and the settings for it.

A method has two phases. `measure` walks over the tensor as often as it needs and folds it into
a small state; `combine` turns the chunks of the inputs into the chunk of the output. Neither
ever holds a whole tensor.

Shapes: n = entries of a chunk, N = merged models.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from drift_merge.maths.spectra.matrices import Matrix

# Measured sums are folded over blocks of this many entries at fixed positions, whatever the
# chunks are, so that no result depends on how the stream was cut. A chunk size of the engine
# that is a multiple of it costs no copy.
BLOCK = 2**17
# Methods with temporary tensors work on pieces of a chunk, which stay in the cache of a core. Half
# of it costs a tenth more in calls; its double holds too much for caches of 1 MB.
PIECE = 2**16
_ALIGNMENT = 64  # bytes; a fused dot product may round by the alignment of its operands


@dataclass(slots=True)
class Chunk:
    """A contiguous range of one output tensor, with all inputs aligned to it.

    The tensors are scratch: a method may overwrite them, and its result may be one of them.
    """

    begin: int  # first entry, counted in the flat tensor
    cols: int  # row length of the tensor's 2-D view: shape[-1], or 1 for 1-D tensors
    mllm: Tensor  # shape (n,), float32, or float64 where an input is
    reasoners: list[Tensor]  # each of shape (n,)
    base: Tensor | None  # shape (n,), or None

    @property
    def end(self) -> int:
        """One past the last entry."""
        return self.begin + self.mllm.numel()

    def models(self) -> list[Tensor]:
        """Every input, the mllm first and the base last."""
        return [self.mllm, *self.reasoners, *([] if self.base is None else [self.base])]


class Read(Protocol):
    """A walk over the chunks of one tensor, in order; every call starts again from the first.

    With `sample=True` a reader may yield only a part, spread evenly over the tensor (about one
    entry in 64, in short runs), to save time; it may as well yield everything. A method takes
    hints from a sample, never a result. With `within` it may leave out chunks that have no entry
    of that range of the flat tensor.
    """

    def __call__(
        self, *, sample: bool = False, within: tuple[int, int] | None = None
    ) -> Iterator[Chunk]:
        """Yield chunks with fresh contents."""


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """The options of a method, resolved for one tensor; methods only read it."""

    weights: tuple[float, ...]  # one per reasoner
    mllm_weight: float
    variant: str  # "paper", "mergekit" or "peft"
    numbers: Mapping[str, float]  # density, scale, t, ... by the name of the option
    flags: Mapping[str, bool]  # normalize, rescale, ... by the name of the option
    words: Mapping[str, str]  # options that are text, likewise
    key: int  # 64-bit key of (seed, method, canonical name), for random masks
    shape: tuple[int, ...]  # of the tensor
    is_weighted: bool  # the weights were given by the user
    matrices: tuple[Matrix, ...] = ()  # that the tensor holds; none: it is left to plain weights
    gates: Tensor | None = None  # (k,), factors of the directions, where a file gives them

    @property
    def numel(self) -> int:
        """Entries of the tensor."""
        return prod(self.shape)

    @property
    def row_length(self) -> int:
        """Entries of a row for row-wise methods: shape[-1]; a 1-D tensor is one row."""
        return self.shape[-1] if self.shape else 1


def in_memory(
    mllm: Tensor, reasoners: Sequence[Tensor], base: Tensor | None, chunk_elements: int
) -> Read:
    """A reader of whole tensors, cut into chunks of `chunk_elements`; copies, so they stay whole.

    Args:
        mllm: shape S.
        reasoners: each of shape S.
        base: shape S, or None.
        chunk_elements: entries per chunk, at least 1; for row-wise methods whole rows.
    """
    inputs = [mllm, *reasoners, *([] if base is None else [base])]
    wide = any(t.dtype == torch.float64 for t in inputs)
    compute = torch.float64 if wide else torch.float32
    flat = [t.reshape(-1) for t in inputs]
    cols = mllm.shape[-1] if mllm.ndim > 1 else 1

    def read(*, sample: bool = False, within: tuple[int, int] | None = None) -> Iterator[Chunk]:
        step = 64 if sample and mllm.numel() > 64 * chunk_elements else 1
        for begin in range(0, mllm.numel(), chunk_elements * step):
            parts = [t[begin : begin + chunk_elements].to(compute, copy=True) for t in flat]
            ancestor = None if base is None else parts.pop()
            yield Chunk(begin, cols, parts[0], parts[1:], ancestor)

    return read


def blocks(read: Read, size: int = BLOCK) -> Iterator[Chunk]:
    """One walk, regrouped into blocks of `size` entries at multiples of `size`.

    Sums folded over them are equal bit for bit however the reader cuts the tensor. The last
    block may be shorter. Contents are scratch until the next block is asked for.
    """
    pending: list[Chunk] = []
    for chunk in read():
        for piece in pieces(chunk, size):
            pending.append(_kept(piece, size))
            if piece.end % size == 0:
                yield _joined(pending)
                pending = []
    if pending:
        yield _joined(pending)


def pieces(chunk: Chunk, size: int | None = None) -> Iterator[Chunk]:
    """The pieces of a chunk between multiples of `size`: views of its memory.

    The default is `PIECE` on a CPU and the whole chunk elsewhere, where each piece costs launches.
    """
    if size is None:
        size = PIECE if chunk.mllm.device.type == "cpu" else max(chunk.end, 1)
    begin = chunk.begin
    while begin < chunk.end:
        end = min((begin // size + 1) * size, chunk.end)
        inside = slice(begin - chunk.begin, end - chunk.begin)
        mllm, *rest = (t[inside] for t in chunk.models())
        base = rest.pop() if chunk.base is not None else None
        yield Chunk(begin, chunk.cols, mllm, rest, base)
        begin = end


def _kept(piece: Chunk, size: int) -> Chunk:
    """A piece that outlives its chunk: copied, unless it is a whole and aligned block."""
    whole = piece.begin % size == 0 and piece.end % size == 0
    if whole and all(t.data_ptr() % _ALIGNMENT == 0 for t in piece.models()):
        return piece
    base = None if piece.base is None else piece.base.clone()
    reasoners = [t.clone() for t in piece.reasoners]
    return Chunk(piece.begin, piece.cols, piece.mllm.clone(), reasoners, base)


def _joined(pieces: list[Chunk]) -> Chunk:
    if len(pieces) == 1:
        return pieces[0]
    mllm, *rest = (torch.cat(parts) for parts in zip(*(p.models() for p in pieces), strict=True))
    base = rest.pop() if pieces[0].base is not None else None
    return Chunk(pieces[0].begin, pieces[0].cols, mllm, rest, base)

"""Reads pieces of stored tensors into tensors: rectangles that lie apart, rows in any order.

Read, not mapped: a file that shrinks under a map kills the process (SIGBUS).
"""

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.storage.headers import TensorInfo
from drift_merge.storage.mapped import MappedCheckpoint

_WINDOW_BYTES = 2**20  # read at a time where lines lie apart
# To read a line by itself costs a system call, as much as to copy so many bytes in between.
_GAP_BYTES = 2**13
_WASTE = 8  # bytes read for one that is wanted, at most, beyond such gaps


def read_whole(mapped: MappedCheckpoint, info: TensorInfo) -> tuple[Tensor, memoryview]:
    """A stored tensor in memory of its own, in its shape; and its bytes."""
    data = bytearray(info.size_bytes)
    mapped.read(info, 0, memoryview(data))
    dtype = TORCH_DTYPES[info.dtype]
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(info.shape), memoryview(data)


def read_rectangle(
    mapped: MappedCheckpoint, info: TensorInfo, offset: int, strides: tuple[int, int], out: Tensor
) -> None:
    """Fill a matrix: element (i, j) is `offset + i * strides[0] + j * strides[1]` of a tensor.

    Args:
        mapped: holds the tensor.
        info: of the tensor.
        offset: first element, flat.
        strides: in elements, at least 0.
        out: shape (rows, cols), on the CPU, any strides and dtype.

    Raises:
        CheckpointError: see `MappedCheckpoint.read`.
    """
    if out.numel() == 0:
        return
    if strides[1] > strides[0] and out.shape[0] > 1 < out.shape[1]:
        out, strides = out.T, (strides[1], strides[0])
    dtype = TORCH_DTYPES[info.dtype]
    (lines, count), (step, inner) = out.shape, strides
    span = (count - 1) * inner + 1
    is_solid = inner == 1 or count == 1
    if is_solid and out.dtype == dtype and out.is_contiguous() and (lines == 1 or step == count):
        mapped.read(info, offset * dtype.itemsize, bytes_of(out))
        return
    is_dense = step <= _WASTE * span or step * dtype.itemsize <= _GAP_BYTES
    if not is_dense:
        memory = torch.empty(lines * span, dtype=dtype)
        data, size = bytes_of(memory), span * dtype.itemsize
        for i in range(lines):
            begin = (offset + i * step) * dtype.itemsize
            mapped.read(info, begin, data[i * size : (i + 1) * size])
        out.copy_(memory.as_strided((lines, count), (span, inner)))
        return
    together = 1 + max(0, _WINDOW_BYTES // dtype.itemsize - span) // max(step, 1)
    memory = torch.empty((min(together, lines) - 1) * step + span, dtype=dtype)
    for first in range(0, lines, together):
        found = min(together, lines - first)
        piece = memory[: (found - 1) * step + span]
        mapped.read(info, (offset + first * step) * dtype.itemsize, bytes_of(piece))
        out[first : first + found].copy_(piece.as_strided((found, count), (step, inner)))


def read_rows(
    mapped: MappedCheckpoint, pieces: Sequence[TensorInfo], rows: Sequence[int], out: Tensor
) -> None:
    """Rows by number, counted on from one piece of a table to the next.

    Args:
        mapped: holds the pieces.
        pieces: of one table; each holds whole rows.
        rows: of the table, in any order; one below 0 takes row 0.
        out: shape (len(rows), cols), on the CPU, contiguous.

    Raises:
        CheckpointError: see `MappedCheckpoint.read`.
    """
    cols = out.shape[1]
    line, data = cols * out.dtype.itemsize, bytes_of(out)
    wanted = torch.tensor(rows, dtype=torch.int64).clamp_(min=0)
    first = 0
    for info in pieces:
        count = info.numel // max(cols, 1)
        own = ((wanted >= first) & (wanted < first + count)).nonzero().view(-1)
        at = wanted[own] - first
        cuts = ((at.diff() != 1) | (own.diff() != 1)).nonzero().view(-1) + 1
        for place, row, found in _runs(own, at, [0, *cuts.tolist(), len(own)]):
            if TORCH_DTYPES[info.dtype] == out.dtype:
                mapped.read(info, row * line, data[place * line : (place + found) * line])
            else:
                target = out[place : place + found]
                read_rectangle(mapped, info, row * cols, (cols, 1), target)
        first += count


def _runs(own: Tensor, at: Tensor, cuts: list[int]) -> list[tuple[int, int, int]]:
    """Of each run of neighbours: its first place, its first row, how many rows it has."""
    starts = cuts[:-1] if len(own) else []
    places, rows = own[starts].tolist(), at[starts].tolist()
    lengths = [end - begin for begin, end in pairwise(cuts)]
    return list(zip(places, rows, lengths, strict=False))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU; valid while it lives."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")

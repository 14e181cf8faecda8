"""The GPU's kernels in Triton: three launches a step for all tensors of one dtype.

A program takes one block of one run, whose place in memory it finds in a table of pointers. Tables
are built once; at each step only the gradients' pointers are sent anew. The sums of a block are
taken in float32, those of a tensor in float64 and in a fixed order: nothing is atomic.

Importing this needs Triton, which comes with torch for CUDA. With TRITON_INTERPRET=1 it runs on
tensors of a CPU.
"""

# Triton's functions have no types, and where it is not installed neither has its decorator.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from drift_merge.training.inject.kernels.runs import Run

BLOCK = 4096  # elements of a program
_WARPS = 8
_STEP = 256  # blocks that the reduction takes at once
_FIELDS = 6  # of a row of the table: delta, scales, elements, first, width, slot
_KEPT = 64  # tables; gradients that come and go (experts) make ever new ones
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}
# Blocks that are full need no mask, so that 16 bytes are loaded at once.


@triton.jit
def _delta(table, row, at, mask, D: tl.constexpr, SCALING: tl.constexpr, MASKED: tl.constexpr):
    """A block of delta in float32."""
    stored = tl.load(table + row).to(tl.pointer_type(D))
    if not MASKED:
        stored = tl.multiple_of(stored, 16)
    if MASKED:
        values = tl.load(stored + at, mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(stored + at).to(tl.float32)
    if SCALING != 0:
        scales = tl.load(table + row + 1).to(tl.pointer_type(tl.float32))
        place = tl.load(table + row + 3) + at
        width = tl.load(table + row + 4)
        place = place // width if SCALING == 1 else place % width
        values = values * tl.load(scales + place, mask=mask, other=0.0)
    return values


@triton.jit
def _gradient(stored, at, mask, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(stored + at, mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(stored + at).to(tl.float32)
    return values


@triton.jit
def _sum_block(
    gradients, table, run, begin, number, partial,
    G: tl.constexpr, D: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    at = begin + tl.arange(0, N)
    mask = at < tl.load(table + run * 6 + 2)
    stored = tl.load(gradients + run).to(tl.pointer_type(G))
    if not MASKED:
        stored = tl.multiple_of(stored, 16)
    g = _gradient(stored, at, mask, MASKED)
    d = _delta(table, run * 6, at, mask, D, SCALING, MASKED)
    tl.store(partial + 2 * number, tl.sum(g * g, 0).to(tl.float64))
    tl.store(partial + 2 * number + 1, tl.sum(g * d, 0).to(tl.float64))


@triton.jit
def sums_kernel(
    gradients, table, blocks, partial,
    G: tl.constexpr, D: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Two sums of every block."""
    number = tl.program_id(0).to(tl.int64)
    run = tl.load(blocks + 2 * number)
    begin = tl.load(blocks + 2 * number + 1)
    begin = tl.multiple_of(begin, N)
    if ALIGNED and begin + N <= tl.load(table + run * 6 + 2):
        _sum_block(gradients, table, run, begin, number, partial, G, D, SCALING, N, False)
    else:
        _sum_block(gradients, table, run, begin, number, partial, G, D, SCALING, N, True)


@triton.jit
def reduce_kernel(partial, ranges, into, columns, N: tl.constexpr):
    """Add the blocks of every slot up, in their order."""
    number = tl.program_id(0).to(tl.int64)
    slot = tl.load(ranges + 3 * number)
    begin = tl.load(ranges + 3 * number + 1)
    end = tl.load(ranges + 3 * number + 2)
    squares = tl.zeros([N], tl.float64)
    dots = tl.zeros([N], tl.float64)
    for first in range(begin, end, N):
        at = first + tl.arange(0, N)
        squares += tl.load(partial + 2 * at, mask=at < end, other=0.0)
        dots += tl.load(partial + 2 * at + 1, mask=at < end, other=0.0)
    to = into + slot * columns
    tl.store(to, tl.load(to) + tl.sum(squares, 0))
    tl.store(to + 1, tl.load(to + 1) + tl.sum(dots, 0))


@triton.jit
def _bias_block(
    gradients, table, run, begin, c,
    G: tl.constexpr, D: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    at = begin + tl.arange(0, N)
    mask = at < tl.load(table + run * 6 + 2)
    stored = tl.load(gradients + run).to(tl.pointer_type(G))
    if not MASKED:
        stored = tl.multiple_of(stored, 16)
    g = _gradient(stored, at, mask, MASKED)
    d = _delta(table, run * 6, at, mask, D, SCALING, MASKED)
    changed = tl.fma(-d, tl.zeros_like(d) + c, g).to(G)
    if MASKED:
        tl.store(stored + at, changed, mask=mask)
    else:
        tl.store(stored + at, changed)


@triton.jit
def bias_kernel(
    gradients, table, blocks, coefficients,
    G: tl.constexpr, D: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """g -= c * delta, block by block."""
    number = tl.program_id(0).to(tl.int64)
    run = tl.load(blocks + 2 * number)
    begin = tl.load(blocks + 2 * number + 1)
    c = tl.load(coefficients + tl.load(table + run * 6 + 5)).to(tl.float32)
    begin = tl.multiple_of(begin, N)
    if ALIGNED and begin + N <= tl.load(table + run * 6 + 2):
        _bias_block(gradients, table, run, begin, c, G, D, SCALING, N, False)
    else:
        _bias_block(gradients, table, run, begin, c, G, D, SCALING, N, True)


@dataclass(frozen=True, slots=True)
class _Tables:
    """What is known of some runs before a step; on the device."""

    key: tuple[Any, ...]
    table: Tensor  # (runs, _FIELDS), int64
    blocks: Tensor  # (blocks, 2): number of the run, first element
    ranges: Tensor  # (slots, 3): slot, first block, end
    partial: Tensor  # (blocks, 2), float64
    gradients: Tensor  # (runs,), int64: pointers of this step
    host: Tensor  # the same, pinned
    types: dict[str, Any]  # constants of the kernels


class TritonKernels:
    """Both passes in Triton."""

    name = "triton"

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], _Tables] = {}

    def sums(self, runs: list[Run], into: Tensor) -> None:
        """As `Kernels.sums`."""
        for tables in self._tables(runs):
            blocks = len(tables.blocks)
            self.launch(
                *(sums_kernel, blocks, tables.gradients, tables.table, tables.blocks),
                *(tables.partial,),
                **tables.types,
            )
            self.launch(
                *(reduce_kernel, len(tables.ranges), tables.partial, tables.ranges, into),
                *(into.stride(0),),
                N=_STEP,
            )

    def bias(self, runs: list[Run], coefficients: Tensor) -> None:
        """As `Kernels.bias`."""
        for tables in self._tables(runs):
            self.launch(
                *(bias_kernel, len(tables.blocks), tables.gradients, tables.table),
                *(tables.blocks, coefficients),
                **tables.types,
            )

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel; the one place where that is done."""
        kernel[(programs,)](*arguments, **constants, num_warps=_WARPS)

    def _tables(self, runs: list[Run]) -> list[_Tables]:
        found = []
        for _, same in groupby(sorted(runs, key=_order), key=_kind):
            held = [run for run in same if run.numel]
            if held:
                found.append(self._table(held))
        return found

    def _table(self, runs: list[Run]) -> _Tables:
        """The tables of some runs, known or new, with the gradients of now."""
        key = tuple(x for run in runs for x in _row(run))
        place = (len(runs), runs[0].slot, runs[-1].slot, *key[:2])
        tables = self._known.get(place)
        if tables is None or tables.key != key:
            if len(self._known) >= _KEPT:
                self._known.clear()
            tables = self._known[place] = _make(runs, key)
        pointers = torch.tensor([run.gradient.data_ptr() for run in runs], dtype=torch.int64)
        if not torch.equal(pointers, tables.host):
            # A buffer of its own for each sending: the one before may still be on its way.
            host = pointers.pin_memory() if tables.gradients.is_cuda else pointers
            tables.host.copy_(pointers)
            tables.gradients.copy_(host, non_blocking=True)
        return tables


def _order(run: Run) -> tuple[str, int]:
    return str(_kind(run)), run.slot


def _kind(run: Run) -> tuple[Any, ...]:
    scaling = 0 if run.delta.scales is None else 2 if run.delta.is_by_column else 1
    pointers = run.gradient.data_ptr() | run.delta.elements.data_ptr()
    return run.gradient.dtype, run.delta.elements.dtype, scaling, pointers % 16 == 0


def _row(run: Run) -> tuple[int, ...]:
    delta = run.delta
    scales = 0 if delta.scales is None else delta.scales.data_ptr()
    return (delta.elements.data_ptr(), scales, run.numel, delta.first, delta.width, run.slot)


def _make(runs: list[Run], key: tuple[int, ...]) -> _Tables:
    device = runs[0].gradient.device
    gradient, delta, scaling, is_aligned = _kind(runs[0])
    blocks: list[tuple[int, int]] = []
    ranges: list[tuple[int, int, int]] = []
    for slot, same in groupby(enumerate(runs), key=lambda item: item[1].slot):
        begin = len(blocks)
        blocks += [(i, at) for i, run in same for at in range(0, run.numel, BLOCK)]
        ranges.append((slot, begin, len(blocks)))
    table = torch.tensor(key, dtype=torch.int64).view(-1, _FIELDS)
    return _Tables(
        key=key,
        table=table.to(device),
        blocks=torch.tensor(blocks, dtype=torch.int64).to(device),
        ranges=torch.tensor(ranges, dtype=torch.int64).to(device),
        partial=torch.empty(len(blocks), 2, dtype=torch.float64, device=device),
        gradients=torch.zeros(len(runs), dtype=torch.int64, device=device),
        host=torch.zeros(len(runs), dtype=torch.int64),
        types={
            **{"G": _TYPES[gradient], "D": _TYPES[delta], "SCALING": scaling},
            **{"N": BLOCK, "ALIGNED": is_aligned},
        },
    )

"""Are the live weights those that the prior was computed against? delta belongs to that model.

Where a rank holds a tensor whole, in a dtype that loses nothing of the stored one, its bytes are
fingerprinted. Elsewhere (another dtype, sharded) the norm and a few recorded values are compared,
within the rounding of the live dtype. Weights that were loaded in 16 bits and widened (masters of
DeepSpeed, FSDP2's mixed precision, model.float()) hold what 16 bits could: where every live value
is one of a narrower dtype, its rounding is allowed, and that is said.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod, sqrt
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.engine.workspace import HostBuffer
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.measures import positions
from drift_merge.names.tensors import matrix_shape
from drift_merge.storage.fingerprints import Fingerprint
from drift_merge.storage.measured import TensorRecord
from drift_merge.training.match.live import is_quantized
from drift_merge.training.match.samples import NARROW, is_recorded, rounding
from drift_merge.training.units import Region, Unit

_CHUNK = 2**18  # elements
_RECORDED = 2e-5  # relative error of a recorded norm, and of ours: sums in float32 over chunks


class WeightLayout(Protocol):
    """Where weights lie: a `GradientLayout`, or what has read them from a file."""

    def region(self, unit: Unit) -> Region | None:
        """The part of a unit on this rank; None: nothing of it."""

    def values(self, unit: Unit) -> Tensor | None:
        """Its values."""

    def group(self, unit: Unit) -> ProcessGroup | None:
        """The ranks that share the unit."""


@dataclass(slots=True)
class _Found:
    """What was seen of one tensor of the prior.

    `wrong`, `moved` and `eps` have an entry for the live dtype, and one for each of NARROW.
    """

    name: str
    entry: TensorRecord
    square: float = 0.0  # sum of theta*theta on this rank, then on all
    wrong: list[float] = field(default_factory=lambda: [0.0] * (1 + len(NARROW)))
    moved: float = 0.0  # recorded values that are not what rounding makes of them
    wide: list[float] = field(default_factory=lambda: [0.0] * len(NARROW))  # not of that dtype
    is_whole: bool = True  # the units cover the prior's tensor
    eps: float = 0.0  # of the live dtype, where it cannot hold the stored one
    fingerprint: str | None = None

    @property
    def is_equal(self) -> bool:
        """Whether the bytes are those of the stored tensor."""
        return self.fingerprint == self.entry["fingerprint_mllm"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The live weights beside those of the prior's mllm."""

    total: int  # tensors
    wrong: tuple[str, ...]  # what differs beyond rounding, in words
    rounded: Mapping[str, int]  # dtype -> tensors that were loaded in it and widened
    moved: int  # tensors that training has changed, as far as can be seen


def compare_weights(
    units: Sequence[Unit], entries: Mapping[str, TensorRecord], layout: WeightLayout
) -> Comparison:
    """Compare the live weights with what the prior recorded of the mllm.

    Where gradients are sharded all ranks call this together, and all come to the same result.

    Args:
        units: to be biased. Packed weights are not looked at.
        entries: the manifest's tensors by canonical name.
        layout: gives the values of this rank.
    """
    by_name: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.parameter is not None and not is_quantized(unit.parameter):
            by_name.setdefault(unit.name, []).append(unit)
    found = {}
    groups: dict[int, tuple[ProcessGroup, list[str]]] = {}
    for name, its_units in by_name.items():
        group = layout.group(its_units[0])
        found[name] = _inspect(name, its_units, entries[name], layout, group)
        if group is not None:
            groups.setdefault(id(group), (group, []))[1].append(name)
    for group, names in groups.values():
        _reduce([found[name] for name in names], group, _device(by_name[names[0]][0]))
    judged = [_judge(one) for one in found.values()]
    wrong = tuple(text for _, text in judged if text is not None)
    rounded = Counter(str(dtype).removeprefix("torch.") for dtype, _ in judged if dtype is not None)
    return Comparison(len(found), wrong, rounded, sum(map(_has_moved, found.values())))


def _inspect(
    name: str,
    units: Sequence[Unit],
    entry: TensorRecord,
    layout: WeightLayout,
    group: ProcessGroup | None,
) -> _Found:
    found = _Found(name, entry)
    numel = prod(entry["shape"])
    found.is_whole = sum(unit.numel for unit in units) == numel
    stored = TORCH_DTYPES.get(entry.get("dtype_mllm", ""))
    held = [(unit, layout.values(unit)) for unit in units]
    dtypes = {values.dtype for _, values in held if values is not None}
    found.eps = max((rounding(dtype, entry) for dtype in dtypes), default=0.0)
    is_here = all(v is not None and v.numel() == unit.numel for unit, v in held)
    is_straight = all(u.origin.step == 1 and not u.origin.is_transposed for u in units)
    if stored and not found.eps and group is None and found.is_whole and is_here and is_straight:
        found.fingerprint = _fingerprint(held, stored)
        if found.is_equal:
            return found
    for unit, values in held:
        if values is not None:
            _measure(found, unit, values, layout)
    return found


def _measure(found: _Found, unit: Unit, values: Tensor, layout: WeightLayout) -> None:
    """Add what a unit shows to what was found of its tensor."""
    for chunk in _chunks(values):
        found.square += float(torch.dot(chunk, chunk))
        for number, dtype in enumerate(NARROW):
            if not found.wide[number] and not found.eps:  # one value is enough
                found.wide[number] += float(not torch.equal(chunk.to(dtype).to(chunk.dtype), chunk))
    recorded = list(_recorded(unit, values, found.entry, layout))
    own = (values.dtype, found.eps)
    for number, (dtype, eps) in enumerate([own, *((d, torch.finfo(d).eps) for d in NARROW)]):
        found.wrong[number] += sum(
            not is_recorded(live, value, dtype, eps) for live, value in recorded
        )
    dtypes = (values.dtype, *NARROW)
    found.moved += sum(
        all(live != float(torch.tensor(value, dtype=torch.float64).to(d)) for d in dtypes)
        for live, value in recorded
    )


def _fingerprint(held: Sequence[tuple[Unit, Tensor | None]], stored: torch.dtype) -> str:
    """Of the bytes that the live values have in the stored dtype, in the stored order."""
    fingerprint, buffer = Fingerprint(), HostBuffer(pinned=False)
    for _, values in sorted(held, key=lambda pair: (pair[0].origin.row, pair[0].origin.col)):
        assert values is not None
        flat = values.reshape(-1)
        for begin in range(0, flat.numel(), _CHUNK):
            chunk = flat[begin : begin + _CHUNK]
            buffer.tensor(stored, chunk.numel()).copy_(chunk)
            fingerprint.update(buffer.bytes(chunk.numel() * stored.itemsize))
    return fingerprint.text()


def _chunks(values: Tensor) -> Iterator[Tensor]:
    flat = values.reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        yield chunk if chunk.dtype == torch.float64 else chunk.float()


def _recorded(
    unit: Unit, values: Tensor, entry: TensorRecord, layout: WeightLayout
) -> Iterator[tuple[float, float]]:
    """The recorded values that this rank holds: as they are here, and as they were stored."""
    sample = entry.get("sample_mllm", ())
    for position, recorded in zip(positions(prod(entry["shape"])), sample, strict=False):
        index = _local_index(unit, position, tuple(entry["shape"]), layout)
        if index is not None and recorded is not None:
            yield float(values[index]), recorded


def _local_index(
    unit: Unit, position: int, stored: tuple[int, ...], layout: WeightLayout
) -> tuple[int, ...] | None:
    """Where an element of the prior's tensor lies in this rank's values of a unit."""
    row, col = divmod(position, matrix_shape(stored)[1])
    row, col = row - unit.origin.row, col - unit.origin.col
    if unit.origin.is_transposed:
        row, col = col, row
    row, beside = divmod(row, unit.origin.step)
    rows, cols = matrix_shape(unit.shape)
    region = layout.region(unit)
    if region is None or beside or not (0 <= row < rows and 0 <= col < cols):
        return None
    flat = row * cols + col
    if region.flat is not None:
        begin, end = region.flat
        return (flat - begin,) if begin <= flat < end else None
    assert region.slices is not None
    index = []
    for size, part in reversed(list(zip(unit.shape, region.slices, strict=True))):
        flat, inside = divmod(flat, size)
        start, stop, _ = part.indices(size)
        if not start <= inside < stop:
            return None
        index.append(inside - start)
    return tuple(reversed(index))


def _device(unit: Unit) -> torch.device:
    assert unit.parameter is not None
    return unit.parameter.device


def _reduce(found: Sequence[_Found], group: ProcessGroup, device: torch.device) -> None:
    """Add up what the ranks of a group have seen; the coarsest dtype decides."""
    local = [[one.square, one.moved, *one.wide, *one.wrong] for one in found]
    sums = torch.tensor(local, dtype=torch.float64, device=device)
    eps = torch.tensor([one.eps for one in found], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums, group=group)
    torch.distributed.all_reduce(eps, op=torch.distributed.ReduceOp.MAX, group=group)
    for one, row, widest in zip(found, sums.tolist(), eps.tolist(), strict=True):
        one.square, one.moved, one.eps = row[0], row[1], widest
        one.wide, one.wrong = row[2 : 2 + len(NARROW)], row[2 + len(NARROW) :]


def _judge(found: _Found) -> tuple[torch.dtype | None, str | None]:
    """The narrower dtype that explains the live values, if one is needed; or what differs."""
    if found.fingerprint is not None:
        expected = found.entry["fingerprint_mllm"]
        text = f"{found.name}: {found.fingerprint}, recorded {expected}"
        difference = None if found.is_equal else text
    else:
        difference = _difference(found, found.wrong[0], found.eps)
    if difference is None or found.eps:
        return None, difference
    for dtype, wide, wrong in zip(NARROW, found.wide, found.wrong[1:], strict=True):
        is_seen = bool(found.entry.get("sample_mllm"))
        if is_seen and not wide and _difference(found, wrong, torch.finfo(dtype).eps) is None:
            return dtype, None
    return None, difference


def _difference(found: _Found, wrong: float, eps: float) -> str | None:
    """What differs beyond a relative rounding of eps, in words; None if nothing does."""
    if wrong:
        return f"{found.name}: {wrong:.0f} of its recorded values are others"
    norm, recorded = sqrt(max(found.square, 0.0)), found.entry.get("norm_mllm")
    if recorded is None or not found.is_whole or not isfinite(recorded):
        return None
    if abs(norm - recorded) <= (_RECORDED + eps) * recorded:
        return None
    return f"{found.name}: |theta| is {norm:.6g}, recorded {recorded:.6g}"


def _has_moved(found: _Found) -> bool:
    """Whether training has changed a tensor: its bytes, or one of its recorded values."""
    narrow, difference = _judge(found)
    if found.fingerprint is not None and narrow is None:
        return not found.is_equal
    return difference is not None or found.moved > 0

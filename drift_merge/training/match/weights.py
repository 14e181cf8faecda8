"""Are the live weights those that the prior was computed against? delta belongs to that model.

Where a rank holds a tensor whole, in a dtype that loses nothing of the stored one, its bytes are
fingerprinted. Elsewhere (another dtype, sharded) the norm and a few recorded values are compared,
within the rounding of the live dtype.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod, sqrt

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from drift_merge.engine.workspace import HostBuffer
from drift_merge.errors import VerificationError
from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.measures import positions
from drift_merge.names.tensors import matrix_shape
from drift_merge.storage.fingerprints import Fingerprint
from drift_merge.storage.measured import TensorRecord
from drift_merge.training.gradients.layout import GradientLayout
from drift_merge.training.match.live import is_quantized
from drift_merge.training.match.samples import is_recorded, rounding
from drift_merge.training.units import Unit

_CHUNK = 2**18  # elements
_RECORDED = 2e-5  # relative error of a recorded norm, and of ours: sums in float32 over chunks
_FEW = 3


@dataclass(slots=True)
class _Found:
    """What was seen of one tensor of the prior."""

    name: str
    entry: TensorRecord
    square: float = 0.0  # sum of theta*theta on this rank, then on all
    wrong: float = 0.0  # recorded values that differ
    is_whole: bool = True  # the units cover the prior's tensor
    eps: float = 0.0  # of the live dtype, where it cannot hold the stored one
    fingerprint: str | None = None


def check_weights(
    units: Sequence[Unit],
    entries: Mapping[str, TensorRecord],
    layout: GradientLayout,
    *,
    is_strict: bool,
    command: str,
) -> None:
    """Compare the live weights with what the prior recorded of the mllm.

    Where gradients are sharded all ranks call this together, and all come to the same result.

    Args:
        units: to be biased. Packed weights are not looked at.
        entries: the manifest's tensors by canonical name.
        layout: gives the values of this rank.
        is_strict: refuse other weights; otherwise warn.
        command: how to compute a prior for the live weights, for the message.

    Raises:
        VerificationError: naming the first tensors that differ.
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
    wrong = [text for text in map(_difference, found.values()) if text]
    if wrong:
        _refuse(wrong, len(found), command, is_strict=is_strict)


def _inspect(
    name: str,
    units: Sequence[Unit],
    entry: TensorRecord,
    layout: GradientLayout,
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
        return found
    for unit, values in held:
        if values is not None:
            found.square += sum(float(torch.dot(c, c)) for c in _chunks(values))
            found.wrong += _wrong_values(unit, values, entry, layout, found.eps)
    return found


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


def _wrong_values(
    unit: Unit, values: Tensor, entry: TensorRecord, layout: GradientLayout, eps: float
) -> int:
    """How many of the recorded values that this rank holds are others here."""
    sample = entry.get("sample_mllm", ())
    wrong = 0
    for position, recorded in zip(positions(prod(entry["shape"])), sample, strict=False):
        index = _local_index(unit, position, tuple(entry["shape"]), layout)
        if index is None or recorded is None:
            continue
        wrong += not is_recorded(float(values[index]), recorded, values.dtype, eps)
    return wrong


def _local_index(
    unit: Unit, position: int, stored: tuple[int, ...], layout: GradientLayout
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
    local = [[one.square, one.wrong] for one in found]
    sums = torch.tensor(local, dtype=torch.float64, device=device)
    eps = torch.tensor([one.eps for one in found], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums, group=group)
    torch.distributed.all_reduce(eps, op=torch.distributed.ReduceOp.MAX, group=group)
    for one, (square, wrong), widest in zip(found, sums.tolist(), eps.tolist(), strict=True):
        one.square, one.wrong, one.eps = square, wrong, widest


def _difference(found: _Found) -> str | None:
    """What differs, in words; None if nothing does."""
    if found.fingerprint is not None:
        expected = found.entry["fingerprint_mllm"]
        is_equal = found.fingerprint == expected
        return None if is_equal else f"{found.name}: {found.fingerprint}, recorded {expected}"
    if found.wrong:
        return f"{found.name}: {found.wrong:.0f} of its recorded values are others"
    norm, recorded = sqrt(max(found.square, 0.0)), found.entry.get("norm_mllm")
    if recorded is None or not found.is_whole or not isfinite(recorded):
        return None
    if abs(norm - recorded) <= (_RECORDED + found.eps) * recorded:
        return None
    return f"{found.name}: |theta| is {norm:.6g}, recorded {recorded:.6g}"


def _refuse(wrong: Sequence[str], total: int, command: str, *, is_strict: bool) -> None:
    more = f"\n  ... {len(wrong) - _FEW:,} more" if len(wrong) > _FEW else ""
    message = (
        f"the model does not have the weights that the prior was computed against:"
        f" {len(wrong):,} of {total:,} tensors differ."
        + "".join(f"\n  {text}" for text in wrong[:_FEW])
        + more
    )
    if is_strict:
        raise VerificationError(
            message,
            remedy="Attach before the first training step; to go on with a run, pass its state:"
            " attach(..., state=...). For other weights compute a prior of their own:\n"
            f"{command}\nOr pass strict=False to train with this one.",
        )
    warnings.warn(message, stacklevel=4)

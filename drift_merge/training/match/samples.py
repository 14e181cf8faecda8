"""Is this tensor in memory the one that the prior recorded? By the few values of its manifest.

Only what this process holds whole can be looked at. Equal values make a pair where nothing else
in the layer has them; names and shapes alone never do.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.measures import positions
from drift_merge.names.tensors import Shape
from drift_merge.storage.measured import TensorRecord

NARROW = (torch.float16, torch.bfloat16)  # the finer first: what weights may have been loaded in


def rounding(live: torch.dtype, entry: TensorRecord) -> float:
    """The relative error of a live dtype that cannot hold the stored one; 0 where it can."""
    stored = TORCH_DTYPES.get(entry.get("dtype_mllm", ""))
    if stored is not None and torch.promote_types(live, stored) == live:
        return 0.0
    return torch.finfo(live).eps


def is_recorded(live: float, recorded: float, dtype: torch.dtype, eps: float) -> bool:
    """Whether a live value is the recorded one, within the rounding of its dtype."""
    tiny = torch.finfo(dtype).smallest_normal * eps
    return abs(live - recorded) <= eps * abs(recorded) + tiny


@dataclass(frozen=True, slots=True)
class Sample:
    """The values of a tensor in memory at the positions that manifests record."""

    values: tuple[float, ...]
    dtype: torch.dtype

    def is_of(self, entry: TensorRecord) -> bool:
        """Whether these are the values that were recorded of a tensor of the same shape."""
        narrow = [(d, torch.finfo(d).eps) for d in NARROW if self._fits(d)]  # loaded, then widened
        recorded = list(zip(self.values, entry.get("sample_mllm", ()), strict=False))
        return any(
            all(one is None or is_recorded(value, one, dtype, eps) for value, one in recorded)
            for dtype, eps in [(self.dtype, rounding(self.dtype, entry)), *narrow]
        )

    def _fits(self, dtype: torch.dtype) -> bool:
        """Whether every value is one of a dtype."""
        values = torch.tensor(self.values, dtype=torch.float64)
        return torch.equal(values.to(dtype).double(), values)


def take_sample(tensor: Tensor | None) -> Sample | None:
    """Read a few values of a parameter or buffer; None of what is packed or not here whole."""
    if tensor is None or not _is_whole(tensor):
        return None
    flat = tensor.detach().reshape(-1)
    index = torch.tensor(positions(flat.numel()), device=flat.device)
    return Sample(tuple(flat[index].double().tolist()), tensor.dtype)


def looks_like(tensor: Tensor | None, entry: TensorRecord) -> bool | None:
    """Whether a tensor has the shape and the values that were recorded; None if it cannot be seen.

    Args:
        tensor: a parameter or buffer; None where it is packed.
        entry: of the manifest.
    """
    if tensor is None or not _is_whole(tensor) or _first(entry) is None:
        return None
    sample = take_sample(tensor) if tuple(tensor.shape) == tuple(entry["shape"]) else None
    return sample is not None and sample.is_of(entry)


def find_partners(
    entries: Mapping[str, TensorRecord], tensors: Mapping[str, Tensor | None]
) -> dict[str, str]:
    """Pair what was recorded with what is there.

    Args:
        entries: canonical name -> what the manifest records, of tensors without a partner.
        tensors: name -> tensor, of those that may be partners; each is read once.

    Returns:
        Canonical name -> name: pairs of which neither side has another candidate.
    """
    by_shape: dict[Shape, list[tuple[float, str, Sample]]] = {}
    shapes = {tuple(entry["shape"]) for entry in entries.values()}
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) in shapes and (s := take_sample(tensor)):
            by_shape.setdefault(tuple(tensor.shape), []).append((s.values[0], name, s))
    for group in by_shape.values():
        group.sort(key=lambda one: one[:2])
    candidates = {
        name: _candidates(entry, by_shape.get(tuple(entry["shape"]), []))
        for name, entry in entries.items()
    }
    taken = Counter(other for others in candidates.values() for other in others)
    return {
        name: others[0]
        for name, others in candidates.items()
        if len(others) == 1 and taken[others[0]] == 1
    }


def _candidates(entry: TensorRecord, group: Sequence[tuple[float, str, Sample]]) -> list[str]:
    """The names of a group, sorted by its first values, whose sample is the recorded one."""
    first = _first(entry)
    if first is None:
        return []
    # No dtype rounds to a distance of more than a hundredth, or 1e-6 near zero (float16).
    reach = 0.01 * abs(first) + 1e-6
    begin = bisect_left(group, first - reach, key=lambda one: one[0])
    end = bisect_right(group, first + reach, key=lambda one: one[0])
    return [name for _, name, sample in group[begin:end] if sample.is_of(entry)]


def _first(entry: TensorRecord) -> float | None:
    """The first value recorded of a tensor; None if it was not finite, or none was recorded."""
    return next(iter(entry.get("sample_mllm") or ()), None)


def count_alike(entries: Sequence[tuple[TensorRecord, Tensor | None]]) -> int:
    """How many tensors have the values that were recorded of them."""
    return sum(looks_like(tensor, entry) is True for entry, tensor in entries)


def _is_whole(tensor: Tensor) -> bool:
    """Plain and here: not a shard (DTensor, ZeRO-3), not packed, not without values."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and not hasattr(tensor, "ds_id")
    return is_plain and tensor.is_floating_point() and not tensor.is_meta

"""Is this tensor in memory the one that the prior recorded? By the few values of its manifest.

Only what this process holds whole can be looked at. Equal values make a pair where nothing else
in the layer has them; names and shapes alone never do.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from drift_merge.maths.dtypes import TORCH_DTYPES
from drift_merge.maths.measures import positions
from drift_merge.names.tensors import Shape
from drift_merge.storage.measured import TensorRecord


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


def looks_like(tensor: Tensor | None, entry: TensorRecord) -> bool | None:
    """Whether a tensor has the shape and the values that were recorded; None if it cannot be seen.

    Args:
        tensor: a parameter or buffer; None where it is packed.
        entry: of the manifest.
    """
    shape: Shape = tuple(entry["shape"])
    recorded = entry.get("sample_mllm") or ()
    if tensor is None or not _is_whole(tensor) or not any(r is not None for r in recorded):
        return None
    if tuple(tensor.shape) != shape:
        return False
    eps = rounding(tensor.dtype, entry)
    flat = tensor.detach().reshape(-1)
    index = torch.tensor(positions(prod(shape)), device=flat.device)
    live = flat[index].double().tolist()
    return all(
        one is None or is_recorded(value, one, tensor.dtype, eps)
        for value, one in zip(live, recorded, strict=False)
    )


def find_partners(
    entries: Mapping[str, TensorRecord], tensors: Mapping[str, Tensor | None]
) -> dict[str, str]:
    """Pair what was recorded with what is there, one layer at a time.

    Args:
        entries: canonical name -> what the manifest records, of tensors without a partner.
        tensors: name -> tensor, of those that may be partners.

    Returns:
        Canonical name -> name: pairs of which neither side has another candidate.
    """
    candidates = {
        name: [other for other, tensor in tensors.items() if looks_like(tensor, entry)]
        for name, entry in entries.items()
    }
    taken = [other for others in candidates.values() for other in others]
    return {
        name: others[0]
        for name, others in candidates.items()
        if len(others) == 1 and taken.count(others[0]) == 1
    }


def count_alike(entries: Sequence[tuple[TensorRecord, Tensor | None]]) -> int:
    """How many tensors have the values that were recorded of them."""
    return sum(looks_like(tensor, entry) is True for entry, tensor in entries)


def _is_whole(tensor: Tensor) -> bool:
    """Plain and here: not a shard (DTensor, ZeRO-3), not packed, not without values."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and not hasattr(tensor, "ds_id")
    return is_plain and tensor.is_floating_point() and not tensor.is_meta

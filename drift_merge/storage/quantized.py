"""Refuses quantized inputs before any arithmetic.

Reads configs and headers only. A quantized tensor is a code, not a number: averaging or
subtracting codes gives a model that loads and is wrong. One that is only copied does no harm.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import Checkpoint

FLOATS = {"BF16", "F16", "F32", "F64"}  # dtypes that arithmetic is done on
# Indices and masks: a routing table, say. Codes of 8 bits and less are quantized weights.
TABLES = {"BOOL", "I16", "U16", "I32", "U32", "I64", "U64", "C64"}

# Names that quantization formats give to the codes and scales beside or instead of a weight.
_MARKS = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv"),
    *(".weight_packed", ".absmax", ".quant_map", ".quant_state.", ".SCB"),
)
_MARK = re.compile("|".join(map(re.escape, _MARKS)))


def refuse_quantized(source: Checkpoint, names: Iterable[str]) -> None:
    """Refuse a checkpoint of which a selected tensor is quantized.

    Args:
        source: the checkpoint.
        names: stored names of the tensors that are selected.

    Raises:
        CheckpointError: naming the checkpoint, the format, and the first tensors; also where the
            config names a format and no tensor is in it, so that nobody knows which are.
    """
    known = {*source.scales, *source.scales.values()}  # of a compressed prior
    codes = {
        name
        for name, info in source.tensors.items()
        if (_MARK.search(name) or not (info.dtype in FLOATS or info.dtype in TABLES))
        and name not in known
    }
    owners = {name.partition(mark)[0] for name in codes for mark in _MARKS if mark in name}
    found = [name for name in names if name in codes or name.removesuffix(".weight") in owners]
    if found:
        marked = [name for name in sorted(codes) if name.startswith(_stems(found))]
        raise quantized_error(source, marked)
    if _quantization(source.config) and not codes:
        raise quantized_error(source, [])


def _stems(names: Collection[str]) -> tuple[str, ...]:
    return tuple(name.removesuffix(".weight") for name in names)


def quantized_error(source: Checkpoint, found: Sequence[str]) -> CheckpointError:
    """The CheckpointError for quantized tensors of a checkpoint, by their stored names."""
    examples = ", ".join(f"{name} ({source.tensors[name].dtype})" for name in found[:3])
    more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
    shown = f": {examples}{more}" if found else ""
    quantization = _quantization(source.config)
    return CheckpointError(
        f"{source.source.given} is quantized ({quantization or 'by its tensors'}){shown}.",
        remedy="Use the original checkpoint in bfloat16, float16 or float32, "
        "and quantize the result.",
    )


def _quantization(config: Mapping[str, Any]) -> str | None:
    """The quantization method that a config names, at its top or in a nested text config."""
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        settings = part.get("quantization_config")
        if isinstance(settings, dict):
            return str(settings.get("quant_method", "quantization_config"))
    return None

"""Refuses quantized inputs before any arithmetic.

Reads configs and headers only. A quantized tensor is a code, not a number: averaging or
subtracting codes gives a model that loads and is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drift_merge.errors import CheckpointError
from drift_merge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    pass

FLOATS = {"BF16", "F16", "F32", "F64"}  # dtypes that arithmetic is done on

# Names that quantization formats give to the codes and scales beside or instead of a weight.
_MARKS = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".absmax",
    ".quant_map",
    ".quant_state.",
    ".SCB",
)


def refuse_quantized(sources: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints that say they are quantized, before their names are looked at.

    Raises:
        CheckpointError: naming the checkpoint, the format, and the first tensors.
    """
    for source in sources:
        quantization = _quantization(source.config)
        marked = [name for name in source.tensors if any(mark in name for mark in _MARKS)]
        if quantization or marked:
            raise _quantized(source, quantization, marked)


def _quantized(
    source: Checkpoint, quantization: str | None, found: Sequence[str]
) -> CheckpointError:
    examples = ", ".join(f"{name} ({source.tensors[name].dtype})" for name in found[:3])
    more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
    shown = f": {examples}{more}" if found else ""
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

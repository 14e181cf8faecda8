"""What an adapter that cannot be used is told: the field, its value, a way out to paste."""

import re
from collections.abc import Mapping
from shlex import quote
from typing import Any

from drift_merge.errors import CheckpointError
from drift_merge.storage.weight_map import ADAPTER_CONFIG

_CLASS = re.compile(r"[A-Za-z_]\w*")


def merge_by_peft(label: str, config: Mapping[str, Any]) -> str:
    """A command that merges an adapter into its base; the result stands for the reasoner.

    Args:
        label: the adapter as the user wrote it.
        config: `adapter_config.json`, parsed; names the base and, for some, its class.
    """
    mapping = config.get("auto_mapping")
    model = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if not isinstance(model, str) or _CLASS.fullmatch(model) is None:
        model = "AutoModelForCausalLM"
    base = config.get("base_model_name_or_path") or "BASE"
    code = (
        f"from peft import PeftModel; from transformers import {model} as Model; "
        f"PeftModel.from_pretrained(Model.from_pretrained({base!r}), {label!r})"
        ".merge_and_unload().save_pretrained('MERGED')"
    )
    return f"Let PEFT merge it into its base, then name MERGED instead:\npython -c {quote(code)}"


def refuse_field(
    label: str, config: Mapping[str, Any], field: str, effect: str, *, remedy: str = ""
) -> CheckpointError:
    """The error for a field whose value changes more than the product of the factors."""
    value = repr(config.get(field))
    shown = value if len(value) <= 100 else f"{value[:100]}..."
    return CheckpointError(
        f"the adapter {label} has {field}: {shown} in {ADAPTER_CONFIG}, so it is not plain LoRA:"
        f" {effect}.",
        remedy=remedy or merge_by_peft(label, config),
    )


def damaged(label: str, why: str, *, remedy: str = "Save or download it again.") -> CheckpointError:
    """The error for an adapter whose files contradict themselves or their base."""
    return CheckpointError(f"the adapter {label} cannot be used: {why}.", remedy=remedy)

"""`adapter_config.json`: every field is understood, without effect, or refused by its name.

The fields and defaults are those of `LoraConfig` of PEFT 0.21.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from drift_merge.errors import CheckpointError, RecipeError
from drift_merge.storage.adapters.refusals import damaged, merge_by_peft, refuse_field
from drift_merge.storage.folder.faults import refuse_pointer
from drift_merge.storage.sources import Source
from drift_merge.storage.weight_map import ADAPTER_CONFIG


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields of an adapter that have an effect on the weights."""

    label: str  # the adapter as the user wrote it
    fields: Mapping[str, Any]  # all of them, as they stand in the file
    rank: int  # r, where no pattern says otherwise
    alpha: float  # likewise
    ranks: Mapping[str, int]  # regular expression -> rank, in order: the first match counts
    alphas: Mapping[str, float]  # likewise
    use_rslora: bool  # s = alpha / sqrt(r) instead of alpha / r
    use_dora: bool
    targets: str | tuple[str, ...]  # a regular expression, or ends of module names; empty: not said
    excluded: str | tuple[str, ...]  # likewise
    layers: tuple[int, ...]  # numbers of the layers that are adapted; empty: all
    lists: tuple[str, ...]  # what the list of those layers may be called; empty: anything
    saved: tuple[str, ...]  # ends of the names of modules that are stored whole

    def refuse(self, field: str, effect: str) -> CheckpointError:
        """The error for one of the fields."""
        return refuse_field(self.label, self.fields, field, effect)

    def reject(self, why: str) -> CheckpointError:
        """The error for what the fields allow and this tool cannot do."""
        return damaged(self.label, why, remedy=merge_by_peft(self.label, self.fields))


# Starts that leave the base as it is. All others (pissa, olora, corda, loftq, lora_ga, eva, ...)
# move a part of the base into the factors, or are not known not to.
_STARTS = (True, False, "gaussian", "orthogonal", "mica")
# Others from which PEFT makes the same base again when it loads the adapter.
_REPEATABLE = ("pissa", "olora", "eva")

# No effect on the merged weights, whatever they say.
_WITHOUT_EFFECT = frozenset(
    (
        *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"),
        *("base_model_name_or_path", "revision", "lora_dropout", "runtime_config"),
        # Whether a matrix is stored transposed is a fact of the base; PEFT too heeds that first.
        "fan_in_fan_out",
        # Read only beside use_qalora, megatron_config or a start that are refused.
        *("qalora_group_size", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        "lora_ga_config",
    )
)

# Read into `AdapterConfig`, or checked on the way.
_READ = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("modules_to_save", "init_lora_weights"),
    )
)

# Must be off: null, false or empty. What each would do.
_OFF = {
    "trainable_token_indices": "it replaces rows of the embedding",
    "megatron_config": "its layers are those of Megatron",
    "velora_config": "VeLoRA trains in another way, which was not tested",
    "alora_invocation_tokens": "aLoRA acts from a token of the prompt on, so no weights equal it",
    "use_qalora": "QA-LoRA pools the input in groups before A",
    "monteclora_config": "MonteCLoRA samples the factors",
    "layer_replication": "it repeats layers of the base, so that layer numbers mean others",
    "lora_bias": "it adds to the biases of the base too",
    "target_parameters": "its factors are those of fused parameters, such as experts",
    "use_bdlora": "BD-LoRA stores factors by blocks",
    "arrow_config": "Arrow chooses an adapter for each token, so no weights equal it",
    "kasa_config": "KaSA cuts singular values off the base",
    "ensure_weight_tying": "it changes a head that is the embedding",
}


def read_adapter_config(source: Source) -> AdapterConfig:
    """Read and check `adapter_config.json` of a local directory.

    Raises:
        CheckpointError: it cannot be read, a field has a value of the wrong kind, or one that
            changes more than the product of the factors.
    """
    fields = read_fields(source)
    _require_plain_lora(source.given, fields)
    read = _Reader(source.given, fields)
    return AdapterConfig(
        label=source.given,
        fields=fields,
        rank=read.one("r", 8, _is_rank, "a count above 0"),
        alpha=read.one("lora_alpha", 8, _is_number, "a number"),
        ranks=read.patterns("rank_pattern", _is_rank, "counts above 0"),
        alphas=read.patterns("alpha_pattern", _is_number, "numbers"),
        use_rslora=read.one("use_rslora", False, _is_flag, "true or false"),
        use_dora=read.one("use_dora", False, _is_flag, "true or false"),
        targets=read.modules("target_modules"),
        excluded=read.modules("exclude_modules"),
        layers=read.numbers("layers_to_transform"),
        lists=read.words("layers_pattern", may_be_one=True),
        saved=read.words("modules_to_save"),
    )


def base_of(source: Source) -> str:
    """The base that an adapter names, with its revision if it names one.

    Raises:
        CheckpointError: `adapter_config.json` cannot be read.
        RecipeError: it names none.
    """
    base = named_base(source)
    if base is None:
        raise RecipeError(
            f"{source.given} is a LoRA adapter that names no base.",
            remedy="Name it: --base BASE",
        )
    return base


def named_base(source: Source) -> str | None:
    """`base_of`, or None where the adapter names no base."""
    fields = read_fields(source)
    base, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(base, str) or not base:
        return None
    is_on_hub = isinstance(revision, str) and revision and not os.path.exists(base)
    return f"{base}@{revision}" if is_on_hub else base


def read_fields(source: Source) -> dict[str, Any]:
    """`adapter_config.json` as it is; only that it is a JSON object is checked."""
    assert source.path is not None
    try:
        fields = json.loads((source.path / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError):
            refuse_pointer(f"{source.given}: {ADAPTER_CONFIG}", source.path / ADAPTER_CONFIG)
        raise damaged(source.given, f"{ADAPTER_CONFIG} cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise damaged(source.given, f"{ADAPTER_CONFIG} is not a JSON object")
    return fields


def _require_plain_lora(label: str, fields: Mapping[str, Any]) -> None:
    if fields.get("peft_type") != "LORA":
        raise refuse_field(label, fields, "peft_type", "it is another method")
    start = fields.get("init_lora_weights", True)
    if type(start) not in (bool, str) or start not in _STARTS:
        raise _refuse_start(label, fields, start)
    if fields.get("bias", "none") != "none":
        raise refuse_field(label, fields, "bias", "it trains biases of the base too")
    for field, effect in _OFF.items():
        if fields.get(field):
            raise refuse_field(label, fields, field, effect)
    unknown = fields.keys() - _WITHOUT_EFFECT - _OFF.keys() - _READ
    for field in sorted(unknown):
        value = fields[field]
        if value is not None and value is not False and value not in ("", [], {}):
            raise refuse_field(label, fields, field, "this field is not known, nor what it changes")


def _refuse_start(label: str, fields: Mapping[str, Any], start: Any) -> CheckpointError:
    remedy = ""
    if start not in _REPEATABLE:  # PEFT does not come to the same base when it loads the adapter
        remedy = (
            "Merge it where it was trained, while the model is in memory, and name MERGED instead:"
            "\nmodel.merge_and_unload().save_pretrained('MERGED')"
        )
    effect = (
        "it is not known to leave the base as it is, so that base + s * B @ A need not be what was"
        " trained"
    )
    return refuse_field(label, fields, "init_lora_weights", effect, remedy=remedy)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


class _Reader:
    """Reads fields and checks their kinds; an absent field is at PEFT's default."""

    def __init__(self, label: str, fields: Mapping[str, Any]) -> None:
        self._label, self._fields = label, fields

    def one(self, field: str, default: Any, is_right: Callable[[Any], bool], what: str) -> Any:
        value = self._fields.get(field, default)
        if not is_right(value):
            raise self._wrong(field, what)
        return value

    def patterns(self, field: str, is_right: Callable[[Any], bool], what: str) -> dict[str, Any]:
        found = self._fields.get(field) or {}
        if not isinstance(found, dict) or not all(is_right(value) for value in found.values()):
            raise self._wrong(field, f"an object of {what}")
        for pattern in found:
            self._require_pattern(field, pattern)
        return found

    def modules(self, field: str) -> str | tuple[str, ...]:
        found = self._fields.get(field)
        if isinstance(found, str) and found:
            self._require_pattern(field, found)
            return found
        return self.words(field)

    def words(self, field: str, *, may_be_one: bool = False) -> tuple[str, ...]:
        found = self._fields.get(field) or []
        if may_be_one and isinstance(found, str):
            found = [found]
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            raise self._wrong(field, "a list of names")
        for word in found:
            self._require_pattern(field, word)  # PEFT reads some of them as such
        return tuple(found)

    def numbers(self, field: str) -> tuple[int, ...]:
        found = self._fields.get(field)
        listed = [] if found is None else found if isinstance(found, list) else [found]
        if not all(type(number) is int for number in listed):
            raise self._wrong(field, "a number or a list of numbers")
        return tuple(listed)

    def _require_pattern(self, field: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise self._wrong(field, f"regular expressions ({pattern!r}: {error})") from error

    def _wrong(self, field: str, expected: str) -> CheckpointError:
        value = repr(self._fields.get(field))[:100]
        return damaged(self._label, f"{field} in {ADAPTER_CONFIG} is {value}; expected {expected}")

"""Lineage preflight: what two configs say about whether a merge makes sense.

Reads two parsed `config.json` only. A value that one config leaves out is not compared:
nested text configs are often written without their defaults.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from drift_merge.names.advice.rotary import compare_rotary
from drift_merge.names.modules import classify
from drift_merge.names.tensors import Alignment, Finding, Record

Config = Mapping[str, Any]

_NESTED = ("vlm_config", "text_config", "llm_config", "language_config")
_VISION = re.compile(r"^(?:vision|visual|mm_vision|audio|vit)_?(?:config|tower|model)?$")

# code: (config keys in order of preference, what it is, severity, consequence, remedy)
_FIELDS: dict[str, tuple[tuple[str, ...], str, str, str, str]] = {
    "hidden_size": (
        ("hidden_size", "n_embd", "d_model"),
        "hidden size",
        "error",
        "no tensor can match",
        "Choose a reasoner of the mllm's size.",
    ),
    "num_layers": (
        ("num_hidden_layers", "n_layer", "num_layers"),
        "number of layers",
        "error",
        "layers beyond the shorter tower have no partner",
        "Choose a reasoner of the mllm's size.",
    ),
    "num_heads": (
        ("num_attention_heads", "n_head"),
        "number of attention heads",
        "error",
        "rows of q and columns of o belong to other heads",
        "Choose a reasoner with the mllm's architecture, or pass --modules mlp.",
    ),
    "num_kv_heads": (
        ("num_key_value_heads", "num_attention_heads", "n_head"),
        "number of key and value heads",
        "error",
        "rows of k and v belong to other heads",
        "Choose a reasoner with the mllm's architecture, or pass --modules mlp.",
    ),
    "head_dim": (
        ("head_dim",),
        "head size",
        "error",
        "rows of q, k and v belong to other heads",
        "Choose a reasoner with the mllm's architecture, or pass --modules mlp.",
    ),
    "intermediate_size": (
        ("intermediate_size", "n_inner"),
        "width of the mlp",
        "error",
        "no mlp tensor can match",
        "Choose a reasoner of the mllm's size, or pass --modules attn.",
    ),
    "norm_eps": (
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "epsilon of the norms",
        "warning",
        "the same norm weights act a little differently",
        "Check that both models descend from the same base.",
    ),
    "activation": (
        ("hidden_act", "hidden_activation", "activation_function"),
        "activation of the mlp",
        "warning",
        "mlp weights mean something else",
        "Pass --modules attn.",
    ),
    "vocab_size": (
        ("vocab_size",),
        "vocabulary size",
        "info",
        "rows of embed and head are matched by token, never by number",
        "Nothing to do unless --modules has embed or head; then both need their tokenizer files.",
    ),
    "bos_token_id": (
        ("bos_token_id",),
        "beginning-of-text id",
        "info",
        "the models were trained with other special tokens",
        "Keep the mllm's tokenizer and chat template; merged outputs do.",
    ),
    "eos_token_id": (
        ("eos_token_id",),
        "end-of-text id",
        "info",
        "the models were trained with other special tokens",
        "Keep the mllm's tokenizer and chat template; merged outputs do.",
    ),
}

_ROTARY = ("rope_theta", "rope_scaling", "mrope")
_NOT_TURNED = re.compile(r"\.[vo]_proj\.")  # by rotary angles
# code: the module that a finding is about; "" where it is all of them
_CONCERNS = {
    **{"hidden_size": "", "intermediate_size": "mlp", "activation": "mlp"},
    **dict.fromkeys(("num_heads", "num_kv_heads", "head_dim"), "attn"),
    **dict.fromkeys(_ROTARY, "attn"),
}
_OF_SHAPES = ("hidden_size", "intermediate_size")  # what the shapes themselves tell
# Classes whose head size is hidden size / heads where the config does not give it.
_DERIVED_HEAD_DIM = frozenset(("llama", "mistral", "qwen2", "internlm2", "phi3"))


def text_config(config: Config) -> Config:
    """Return the settings of the language tower: a nested config or `config` itself.

    Knows `text_config`, `llm_config`, `language_config` (one inside another too) and
    `thinker_config`. {} stays {}.
    """
    for key in ("thinker_config", *_NESTED):
        nested = config.get(key)
        if isinstance(nested, Mapping) and nested:
            return text_config(nested)
    return config


def has_vision_config(config: Config) -> bool:
    """Whether a config speaks of an image or audio encoder."""
    keys = [*config, *(config.get("thinker_config") or {})]
    return any(_VISION.match(key) and config.get(key, True) for key in keys)


def lineage(reasoner_config: Config, mllm_config: Config) -> tuple[Finding, ...]:
    """Compare two configs field by field.

    Args:
        reasoner_config: `config.json` of the reasoner, parsed; {} if there is none.
        mllm_config: `config.json` of the mllm; its text settings may be nested.

    Returns:
        Findings in a fixed order, none where values agree or one is not given. Codes:
        model_family, those of the fields (hidden_size, num_layers, num_heads,
        num_kv_heads, head_dim, intermediate_size, norm_eps, activation, vocab_size,
        bos_token_id, eos_token_id), rope_theta, rope_scaling, mrope, tied_embeddings.
    """
    if not reasoner_config or not mllm_config:
        return ()
    ours, theirs = text_config(reasoner_config), text_config(mllm_config)
    findings = _family(ours, theirs)
    for code, (keys, what, severity, consequence, remedy) in _FIELDS.items():
        one, other = _field(ours, code, keys), _field(theirs, code, keys)
        if one is None or other is None or one == other:
            continue
        message = (
            f"The {what} differs: {_show(one)} in the reasoner, {_show(other)} in the mllm;"
            f" {consequence}."
        )
        findings.append(Finding(code, severity, message, remedy))
    families = [_family_name(config.get("model_type")) for config in (ours, theirs)]
    findings += compare_rotary(ours, theirs, families)
    findings += _tied(reasoner_config, mllm_config)
    return tuple(findings)


def weigh_findings(alignment: Alignment) -> Alignment:
    """Let the tensors have the last word over what two configs say.

    A finding about a module of which nothing is selected is a note; so is one about shapes that
    agree all the same. One about some shapes says of how many.
    """
    used = [r for r in alignment.records if r.status not in ("not_selected", "outside_tower")]
    weighed = [_weighed(finding, used) for finding in alignment.findings]
    return replace(alignment, findings=tuple(weighed))


def _weighed(finding: Finding, used: list[Record]) -> Finding:
    module = _CONCERNS.get(finding.code)
    if module is None or finding.severity == "info" or not used:
        return finding
    concerned = [r for r in used if not module or classify(r.name) == module]
    if finding.code in _ROTARY:
        concerned = [r for r in concerned if not _NOT_TURNED.search(r.name)]
    if not concerned:
        what = "q or k" if finding.code in _ROTARY else module
        message = f"{finding.message} No {what} tensor is selected."
        return Finding(finding.code, "info", message, "Nothing to do.")
    if finding.code not in _OF_SHAPES or all(r.shape is None for r in concerned):
        return finding
    num_apart = sum(r.status == "shape_mismatch" for r in concerned)
    consequence = _FIELDS[finding.code][3]
    noun = f"{module} tensors".strip()
    if num_apart == 0:
        agree = f"the shapes of all selected {noun} agree all the same"
        message = finding.message.replace(consequence, agree)
        return Finding(finding.code, "info", message, "Nothing to do.")
    if num_apart == len(concerned):
        return finding
    some = f"{num_apart:,} of {len(concerned):,} selected {noun} have other shapes"
    return replace(finding, message=finding.message.replace(consequence, some))


def is_tied(config: Config) -> bool | None:
    """Whether the head is the embedding; None if the config does not say."""
    flags = [
        part["tie_word_embeddings"]
        for part in (config, text_config(config))
        if isinstance(part.get("tie_word_embeddings"), bool)
    ]
    return any(flags) if flags else None


def is_encoder_decoder(config: Config) -> bool:
    """Whether the config says that the text model has an encoder of its own (T5, BART, Whisper)."""
    return any(part.get("is_encoder_decoder") is True for part in (config, text_config(config)))


def _family(ours: Config, theirs: Config) -> list[Finding]:
    one, other = (_family_name(c.get("model_type")) for c in (ours, theirs))
    if one is None or other is None or one == other:
        return []
    message = (
        f"The model types differ: {ours['model_type']} in the reasoner, {theirs['model_type']}"
        f" in the mllm's config."
    )
    remedy = "Check that the mllm's language tower and the reasoner descend from the same base."
    return [Finding("model_family", "info", message, remedy)]


def _family_name(model_type: object) -> str | None:
    """Return `qwen2` for `qwen2`, `qwen2_vl`, `qwen2_5_vl_text`; `llama` for `mllama_text`."""
    found = re.match(r"[a-z]+\d*", model_type) if isinstance(model_type, str) else None
    return found[0].replace("mllama", "llama") if found else None


def _field(config: Config, code: str, keys: tuple[str, ...]) -> Any:
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    inserted = config.get("cross_attention_layers")
    if code == "num_layers" and isinstance(value, int) and isinstance(inserted, list):
        return value - len(inserted)  # Mllama counts the inserted layers
    if code == "head_dim" and value is None:
        return _derived_head_dim(config)
    return value


def _derived_head_dim(config: Config) -> int | None:
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if _family_name(config.get("model_type")) not in _DERIVED_HEAD_DIM:
        return None
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def _show(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _tied(ours: Config, theirs: Config) -> list[Finding]:
    one, other = is_tied(ours), is_tied(theirs)
    if one is None or other is None or one == other:
        return []
    who, whose = ("reasoner", "mllm") if one else ("mllm", "reasoner")
    message = f"The head is the embedding (tied) in the {who}, a tensor of its own in the {whose}."
    remedy = "Leave head out of --modules; the default attn,mlp is not concerned."
    return [Finding("tied_embeddings", "info", message, remedy)]
